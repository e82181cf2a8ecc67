"""BRECQ: block by block, directions and steps."""

from __future__ import annotations

from dataclasses import replace

from fxquant.core.facts import Rounding
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.rounding.learned import BRECQ
from tests.passes.rounding.tasks import task_of


def test_units_are_blocks_and_steps_are_learned() -> None:
    task = replace(task_of("plain", 4), overrides={"iterations": 3, "batch": 4})
    found = ROUNDERS["brecq"](task)[Rounding]
    assert [unit.sites for unit in found.units] == [("conv1",), ("conv2", "conv3"), ("fc",)]
    assert found.method == "brecq"
    module = task.simulated().module
    moved = [grid.scale != module.get_submodule(f"quantize_{g}").scale for g, grid in found.activations.items()]
    assert any(moved)


def test_inputs_are_the_quantized_networks_without_drops() -> None:
    assert (BRECQ.inputs, BRECQ.drop, BRECQ.prediction) == ("quantized", 0.0, 0.0)
    assert BRECQ.step_lr > 0
