"""AdaRound: layer by layer, directions alone."""

from __future__ import annotations

from dataclasses import replace

from fxquant.core.facts import Rounding
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.rounding.learned import ADAROUND
from tests.passes.rounding.tasks import task_of


def test_units_are_layers_and_steps_stay() -> None:
    task = replace(task_of("plain", 4), overrides={"iterations": 3, "batch": 4})
    found = ROUNDERS["adaround"](task)[Rounding]
    assert [unit.sites for unit in found.units] == [("conv1",), ("conv2",), ("conv3",), ("fc",)]
    assert found.method == "adaround"
    assert not found.grids
    module = task.simulated().module
    for group, grid in found.activations.items():
        quantizer = module.get_submodule(f"quantize_{group}")
        assert (grid.scale, grid.zero_point) == (quantizer.scale, quantizer.zero_point)


def test_neither_drops_nor_the_prediction_are_part_of_it() -> None:
    assert (ADAROUND.drop, ADAROUND.prediction, ADAROUND.step_lr, ADAROUND.inputs) == (0.0, 0.0, 0.0, "quantized")
