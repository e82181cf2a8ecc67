"""Channels are equalized as far as the measured loss falls, and a saved result knows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from fxquant import flow
from fxquant.core.facts import ChannelScales, Settings
from fxquant.core.ir import Program
from fxquant.core.run import CalibrationSet, Observer
from fxquant.flow import equalize
from fxquant.passes import measured_loss, simulate, widest_plan
from tests.passes.equalization.networks import images, network, scale_channel


def _uneven() -> torch.nn.Module:
    model = network("relu")
    for channel, factor in enumerate((1e-3, 1e-2, 1e-1)):
        scale_channel(model, channel, factor)
    return model


def _calibrated(model: torch.nn.Module, factors: bool = True) -> Program:
    prepared = flow.prepare(fxquant.capture(model, images(2)), Settings(bits=(4,), scoring_rounding="nearest"))
    shown = CalibrationSet((images(16),))
    if factors:
        return flow.calibrate(prepared, shown)
    prepared.module(*shown.inputs)
    return flow.calibrate(prepared, None)


def _lost(program: Program, model: torch.nn.Module) -> float:
    unseen = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        reference = model(unseen)
    return measured_loss(simulate(program, widest_plan(program)).module, CalibrationSet((unseen,)), reference, "mse")


def test_uneven_channels_are_equalized_and_lose_less() -> None:
    model = _uneven()
    program = _calibrated(model)
    assert program[ChannelScales].paths
    assert _lost(program, model) < 0.5 * _lost(_calibrated(model, factors=False), model)


def test_observers_see_the_calibration_alone() -> None:
    prepared = flow.prepare(fxquant.capture(_uneven(), images(2)), Settings(bits=(4,), scoring_rounding="nearest"))
    observed = equalize(prepared, CalibrationSet((images(16),))).module
    assert [each.batches for each in observed.modules() if isinstance(each, Observer)] == [0, 0, 0]


@pytest.mark.parametrize("least", [0.0, 0.5, 1.0])
def test_the_power_that_loses_least_is_taken(monkeypatch: pytest.MonkeyPatch, least: float) -> None:
    spans: list[float] = []

    def lost(program: Program, *_: object) -> float:
        factors = program[ChannelScales].multiplied.get("one.weight", torch.ones(1))
        spans.append(float(factors.log().abs().max()))
        # No factors come first, then their full power.
        return abs(spans[-1] - least * spans[1]) if len(spans) > 1 else 1e-9 if least == 0 else 9.0

    monkeypatch.setattr("fxquant.flow.judged_factors.log_loss", lost)
    found = _calibrated(_uneven())[ChannelScales].multiplied.get("one.weight", torch.ones(1)).log().abs().max()
    assert spans == pytest.approx([0, spans[1], spans[1] / 2])
    assert float(found) == pytest.approx(least * spans[1])


def test_a_saved_result_has_the_factors(tmp_path: Path) -> None:
    result = fxquant.quantize(_uneven(), images(24), {"average_bits": 6}, target="reference")
    assert result.program[ChannelScales].paths
    back = fxquant.load(result.save(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(back.simulated(images()), result.simulated(images()))
        assert torch.equal(back.program.module(images()), result.program.module(images()))
