"""Captured programs, made once per test run: export costs seconds, so every test shares them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fxquant.capture import capture
from fxquant.core.facts import Target
from fxquant.core.ir import Choice, Program, Sites, show
from fxquant.core.run import CalibrationSet, first_tensor
from fxquant.passes import (
    Calibrate,
    Canonicalize,
    CollectRanges,
    FindEdges,
    FindSites,
    FoldBatchnorm,
    InsertObservers,
    Pass,
    ScaleWeights,
    TieEdges,
)
from tests.models import MODELS, built

TARGET = Target(
    name="test",
    kernels={"conv": "QConv", "linear": "QLinear"},
    joins=frozenset({"add", "avg_pool", "global_pool"}),
    weight_bits=(2, 4, 8),
    activation_bits=(4, 8),
    storage_bits={2: 2, 4: 4, 8: 8},
    output_quantized=frozenset({"conv"}),
    refuse_joins={"mul": "a product of two activations runs in float here"},
)
"""A runtime whose convolutions can only write integers."""


@cache
def captured(name: str) -> Program:
    """Return the captured program of a network of `tests.models`."""
    return capture(built(name), MODELS[name].inputs(2))


@cache
def folded(name: str) -> Program:
    """Return it canonical, batch norm folded."""
    return FoldBatchnorm()(Canonicalize()(captured(name)))


@cache
def tied(name: str) -> Program:
    """Return it with edges and groups for `TARGET`."""
    return TieEdges()(FindEdges(TARGET)(folded(name)))


@cache
def calibrated(name: str, observer: str = "mse") -> Program:
    """Return it with sites, weight grids and ranges, calibrated on 8 images."""
    images = CalibrationSet(MODELS[name].inputs(8))
    program = FindSites(TARGET, bits=(2, 4, 8), activation_bits=(8,))(tied(name))
    return ScaleWeights()(CollectRanges()(Calibrate(images, batch=3)(InsertObservers(observer)(program))))


def uniform(program: Program, weight_bits: int, activation_bits: int = 8) -> dict[str, Choice]:
    """Return the plan that gives every site one precision."""
    return {site.name: Choice(weight_bits, activation_bits) for site in program[Sites].sites}


def check_pass(step: Pass, program: Program) -> Program:
    """Run a pass and return its program, having checked that its input is what it was, bit for bit."""
    text, state = show(program.module), {k: v.clone() for k, v in program.module.state_dict().items()}
    code, facts = str(program.module.graph), dict(program.facts)
    done = step(program)
    assert show(program.module) == text
    assert str(program.module.graph) == code
    assert dict(program.facts) == facts
    after = program.module.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert done is not program
    assert done.log[-1].name == repr(step)
    return done


def first_answer(module: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the first tensor that a graph returns for all images, which is what compiled graphs return."""
    with torch.no_grad():
        return first_tensor(module(*inputs))
