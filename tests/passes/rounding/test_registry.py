"""The task that every algorithm gets, and nearest rounding, which discards earlier choices."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxquant.core.facts import BitAllocation, Rounding
from fxquant.core.ir import Choice
from fxquant.passes.rounding import ROUNDERS
from tests.passes.rounding.tasks import after, task_of


def test_names_of_a_chain_are_joined_and_nearest_is_no_name() -> None:
    task = task_of("plain", 4)
    one = task.done(task.rounding, "gptq")
    assert one[Rounding].method == "gptq"
    two = replace(task, program=one)
    assert two.done(two.rounding, "pdquant")[Rounding].method == "gptq+pdquant"
    assert task.done(task.rounding, "nearest")[Rounding].method == "nearest"


def test_a_rounding_of_another_plan_does_not_count() -> None:
    task = task_of("plain", 4)
    foreign = Rounding({**task.choices, "fc": Choice(8, 8)}, "gptq", {"conv1": torch.zeros(6, 3, 3, 3)})
    assert replace(task, program=task.program.with_facts(foreign)).rounding.method == "nearest"


def test_sites_in_float_are_not_the_tasks() -> None:
    task = task_of("plain", 4)
    plan = BitAllocation({**task.choices, "conv2": Choice(32, 32)})
    assert [site.name for site in replace(task, program=task.program.with_facts(plan)).sites] == [
        "conv1",
        "conv3",
        "fc",
    ]


def test_the_bare_graph_holds_the_models_weights_and_the_simulated_one_the_roundings() -> None:
    task = task_of("plain", 4)
    chosen = Rounding(task.choices, "gptq", {"conv1": torch.zeros(6, 3, 3, 3)})
    rounded = replace(task, program=task.program.with_facts(chosen))
    weights = [
        dict(p.module.named_parameters())["conv1.weight"].detach() for p in (rounded.bare(), rounded.simulated())
    ]
    assert torch.equal(weights[0], dict(task.program.module.named_parameters())["conv1.weight"].detach())
    assert torch.equal(weights[1], torch.zeros(6, 3, 3, 3))


def test_nearest_rounding_has_the_graph_of_the_plan_alone() -> None:
    task = task_of("plain", 4)
    earlier = task.program.with_facts(Rounding(task.choices, "gptq", {"conv1": torch.zeros(6, 3, 3, 3)}))
    done = ROUNDERS["nearest"](after(task, earlier))
    assert done[Rounding] == Rounding(task.choices, "nearest")
    for path, tensor in task.simulated().module.state_dict().items():
        assert torch.equal(after(task, done).simulated().module.state_dict()[path], tensor)


def test_nearest_rounding_keeps_parameters_that_are_in_the_graph() -> None:
    task = task_of("plain", 4)
    earlier = replace(task.rounding, method="equalize", parameters={"conv1.weight": torch.zeros(1)})
    assert ROUNDERS["nearest"](after(task, task.program.with_facts(earlier)))[Rounding].parameters == earlier.parameters
