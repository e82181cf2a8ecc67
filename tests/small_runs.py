"""A small network through `fxquant.quantize`, and whether two results are the same."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import numpy as np
import torch

import fxquant
from fxquant import Budget, Result
from fxquant.core.run import model_outputs
from tests.scoring import inputs, plain_net

IMAGES = inputs("plain", 24)[0]
BUDGET = Budget(average_bits=4.5)


def quantize(**change: Any) -> Result:
    given = {"model": plain_net(), "calibration": IMAGES, "budget": BUDGET, "target": "reference", **change}
    named = {name: given.pop(name) for name in inspect.signature(fxquant.quantize).parameters if name in given}
    return fxquant.quantize(**named, options=given)


@cache
def quantized(**change: Any) -> Result:
    return quantize(**change)


def same(one: Result, other: Result) -> bool:
    """Whether plan, scores and simulated answers agree bit for bit."""
    answers = [model_outputs(each.simulated, (IMAGES,)) for each in (one, other)]
    return (
        one.allocation.to_json() == other.allocation.to_json()
        and np.array_equal(one.sensitivity.values, other.sensitivity.values)
        and torch.equal(*answers)
    )
