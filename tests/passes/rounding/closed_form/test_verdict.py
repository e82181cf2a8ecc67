"""Held-out images decide over a whole rounding, and either verdict is on record."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, Rounding
from fxquant.core.ir import FLOAT, Sites, tensor_at
from fxquant.passes.rounding import RoundingTask
from fxquant.passes.rounding.closed_form import first_site, judged
from tests.passes.rounding.tasks import images, task_of


def spoilt(task: RoundingTask) -> Rounding:
    """Return a rounding to zeros."""
    sites = task.program[Sites].sites
    zeros = {site.name: torch.zeros_like(tensor_at(task.program.module, site.weight)) for site in sites}
    return replace(task.rounding, weights=zeros)


def test_a_rounding_that_answers_worse_is_put_aside() -> None:
    task = task_of("plain", 4, held_out=images("plain", 5))
    done = judged(task, spoilt(task), "zeros", 1.5)
    found = done[Rounding]
    (record,) = found.units
    assert (record.name, record.method, record.kept, record.seconds) == ("conv1", "zeros", False, 1.5)
    assert record.after > record.before > 0
    assert "held-out mse does not fall" in record.reason
    assert not found.weights
    assert found.method == "nearest"


def test_without_held_out_images_everything_stays() -> None:
    task = task_of("plain", 4)
    found = judged(task, spoilt(task), "zeros", 0.0)[Rounding]
    assert found.units[0].kept
    assert found.method == "zeros"
    assert found.units[0].before != found.units[0].before


def test_a_plan_in_float_has_nothing_to_round() -> None:
    task = task_of("plain", 4)
    floats = BitAllocation(dict.fromkeys(task.choices, FLOAT))
    with pytest.raises(OptionError, match="every site in float"):
        first_site(replace(task, program=task.program.with_facts(floats)))
