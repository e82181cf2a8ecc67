"""Nearest rounding forgets what was chosen before."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxquant.core.facts import Rounding
from fxquant.passes.rounding import ROUNDERS
from tests.passes.rounding.tasks import after, task_of


def test_the_graph_is_that_of_the_plan_alone() -> None:
    task = task_of("plain", 4)
    earlier = task.program.with_facts(Rounding(task.choices, "gptq", {"conv1": torch.zeros(6, 3, 3, 3)}))
    done = ROUNDERS["nearest"](after(task, earlier))
    assert done[Rounding] == Rounding(task.choices, "nearest")
    for path, tensor in task.simulated().module.state_dict().items():
        assert torch.equal(after(task, done).simulated().module.state_dict()[path], tensor)


def test_parameters_that_are_in_the_graph_are_not_forgotten() -> None:
    task = task_of("plain", 4)
    earlier = replace(task.rounding, method="equalize", parameters={"conv1.weight": torch.zeros(1)})
    assert ROUNDERS["nearest"](after(task, task.program.with_facts(earlier)))[Rounding].parameters == earlier.parameters
