"""The task that every algorithm gets."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxquant.core.facts import BitAllocation, Rounding
from fxquant.core.ir import Choice
from tests.passes.rounding.tasks import task_of


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
