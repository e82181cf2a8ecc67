from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from fxquant.core.facts import Settings
from fxquant.core.ir import FLOAT, FakeQuantize, Sites
from fxquant.core.run import CalibrationSet
from fxquant.report import edge_rows, weight_noise
from tests.small import images, small_result


class Recorder(Interpreter):
    """Keeps every value by its node's name."""

    def run_node(self, n: Node) -> object:
        self.values = {**getattr(self, "values", {}), n.name: super().run_node(n)}
        return self.values[n.name]


def decibels(signal: Tensor, rounded: Tensor) -> float:
    return float(10 * torch.log10(signal.double().square().sum() / (signal - rounded).double().square().sum()))


def test_edges_are_those_of_the_graph() -> None:
    simulated = small_result().simulated
    quantizers = {
        str(node.args[0]): simulated.get_submodule(str(node.target))
        for node in simulated.graph.nodes
        if node.op == "call_module" and "weight" not in node.name
    }
    rows = edge_rows(small_result().simulated_program)
    assert {name for row in rows for name in row["producers"]} == set(quantizers)
    for row in rows:
        for producer in row["producers"]:
            quantizer = quantizers[producer]
            assert isinstance(quantizer, FakeQuantize)
            assert row["scale"] == quantizer.scale.item()
            assert row["zero_point"] == quantizer.zero_point.item()
            assert row["bits"] == quantizer.spec.bits
        ends = quantizer(torch.tensor([-1e6, 1e6])).tolist()
        assert [row["low"], row["high"]] == pytest.approx(ends)
    assert rows[0]["name"] == "x (input)"


def test_noise_of_edges_is_that_of_the_calibration_images() -> None:
    result = small_result()
    recorder = Recorder(result.program.module)
    settings = result.program[Settings]
    scoring, _ = CalibrationSet((images(),)).split(settings.held_out, settings.seed)
    with torch.no_grad():
        recorder.run(*scoring.inputs)
    for row in edge_rows(result.simulated_program):
        seen = torch.cat([recorder.values[name].flatten() for name in row["producers"]])
        levels = torch.round(seen / row["scale"]) * row["scale"]
        rounded = levels.clamp(row["low"], row["high"])
        outside = (seen < row["low"] - row["scale"] / 2) | (seen > row["high"] + row["scale"] / 2)
        assert row["minimum"] == pytest.approx(float(seen.min()), abs=1e-5)
        assert row["maximum"] == pytest.approx(float(seen.max()))
        # Bins are an eighth of a step wide, and groups of several values weigh each the same.
        assert row["sqnr_db"] == pytest.approx(decibels(seen, rounded), abs=1.0)
        assert row["clipped"] == pytest.approx(float(outside.double().mean()), abs=0.002)


def test_noise_of_weights_is_that_of_their_grid() -> None:
    result = small_result()
    shown = weight_noise(result.program, result.simulated_program)
    assert list(shown) == [site.name for site in result.program[Sites].sites]
    for site in result.program[Sites].sites:
        weight = result.program.module.get_parameter(site.weight).detach()
        quantizer = result.simulated.get_submodule(f"quantize_{site.name}_weight")
        # What is simulated is rounded for the least error of outputs, not to the nearest values.
        ships = quantizer(result.simulated.get_parameter(site.weight).detach())
        assert shown[site.name] == pytest.approx(decibels(weight, ships), abs=1e-3)


def test_a_layer_in_float_has_no_weight_noise_and_its_edges_no_grid() -> None:
    result = small_result()
    plan = replace(result.allocation, choices={**result.allocation.choices, "head": FLOAT})
    manual = result.with_plan(plan)
    assert set(weight_noise(manual.program, manual.simulated_program)) == {"stem", "body"}
    assert len(edge_rows(manual.simulated_program)) < len(edge_rows(result.simulated_program))
