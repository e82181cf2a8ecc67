"""Corrected biases give every channel the float network's mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxquant.core.facts import Rounding
from fxquant.core.ir import Program, constant, resolve, rule_of
from fxquant.passes.rounding import ROUNDERS
from tests.passes.rounding.tasks import after, mean_errors, task_of

bias_correction = ROUNDERS["bias_correction"]


@pytest.mark.parametrize("name", ["plain", "residual", "separable", "attention", "sequence", "shared"])
def test_every_channels_mean_is_the_float_networks(name: str) -> None:
    task = task_of(name, 4)
    done = bias_correction(task)
    before, behind = mean_errors(task, task.rounding), mean_errors(task, done[Rounding])
    assert max(before.values()) > 0.005
    # What is left is the rounding of biases to the accumulator's step, and values it moves across an edge.
    assert max(behind.values()) < 0.005
    assert max(behind.values()) < 0.2 * max(before.values())


def test_ops_without_a_bias_get_one_and_shared_modules_one_each() -> None:
    task = task_of("plain", 4)
    found = bias_correction(task)[Rounding].biases
    without = [name for name in found if len(resolve(task.program.module.graph, name).args) < 3]
    assert without
    simulated = task.simulated(replace(task.rounding, biases=found))
    for name in found:
        node = resolve(simulated.module.graph, name)
        rule = rule_of(node)
        assert rule is not None
        assert rule.bias is not None
        value = constant(simulated.module, node.args[rule.bias])
        assert value is not None
        assert torch.allclose(value, found[name], atol=1e-2)
    shared = task_of("shared", 4)
    twice = next(site for site in shared.sites if len(site.nodes) == 2)
    biases = bias_correction(shared)[Rounding].biases
    assert not torch.equal(biases[twice.nodes[0]], biases[twice.nodes[1]])


def test_it_follows_another_algorithm_and_keeps_its_weights() -> None:
    task = task_of("plain", 2)
    rounded: Program = ROUNDERS["gptq"](task)
    done = bias_correction(after(task, rounded))
    found = done[Rounding]
    assert found.method == "gptq+bias_correction"
    assert [record.method for record in found.units] == ["gptq", "bias_correction"]
    weights = rounded[Rounding].weights
    assert all(torch.equal(found.weights[name], weights[name]) for name in weights)
    assert max(mean_errors(task, found).values()) < 0.2 * max(mean_errors(task, rounded[Rounding]).values())


def test_a_second_correction_finds_nothing_left() -> None:
    task = task_of("plain", 4)
    once = bias_correction(task)
    twice = bias_correction(after(task, once))
    for name, bias in once[Rounding].biases.items():
        assert torch.allclose(twice[Rounding].biases[name], bias, atol=5e-3)
