from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.backends import backend
from fxquant.bench import bench
from fxquant.core.errors import FileFormatError, InfeasibleBudgetError, OptionError
from fxquant.core.facts import CostTables, Settings, WeightGrids
from fxquant.core.ir import FakeQuantize, WeightFormat
from fxquant.core.run import LOSSES
from fxquant.flow import score_identity
from fxquant.report import summary
from tests.core.facts.test_target_file import written
from tests.small import images, small


def quantized(path: Path, budget: fxquant.Budget, rounding: str = "nearest") -> fxquant.Result:
    return fxquant.quantize(
        small(), images(), budget, bits=(4, 8), target=str(path), effort="fast", rounding=rounding, progress=False
    )


def test_limits_are_those_of_the_file(tmp_path: Path) -> None:
    """Latency comes from the file: 4-bit convolutions are cheap, 8-bit layers cost a millisecond each."""
    path = written(tmp_path)
    result = quantized(path, fxquant.Budget(latency_ms=1.5))
    table = result.program[CostTables]["latency"]
    assert table.of(result.allocation.choices) <= 1.5
    assert result.allocation.choices["stem"].label == result.allocation.choices["body"].label == "W4A8"
    assert "latency_ms" in summary(result.program)
    with pytest.raises(InfeasibleBudgetError, match="latency_ms"):
        quantized(path, fxquant.Budget(latency_ms=0.5))
    with pytest.raises(OptionError, match="does not execute"):
        fxquant.quantize(small(), images(), None, bits=(2, 8), target=str(path), effort="fast", progress=False)


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "gptq_rescaled", "equalize"])
def test_per_tensor_weights_have_one_scale(tmp_path: Path, rounding: str) -> None:
    result = quantized(written(tmp_path), fxquant.Budget(average_bits=6), rounding)
    quantizers = [
        module
        for module in result.simulated.modules()
        if isinstance(module, FakeQuantize) and module.spec.channel_axis is not None
    ]
    assert len(quantizers) == 3
    assert all(len(set(module.scale.tolist())) == 1 for module in quantizers)
    channels = result.program[WeightGrids].at("body", WeightFormat(8))
    assert channels.scale.shape == (6,)


def test_per_channel_weights_have_their_own(tmp_path: Path) -> None:
    result = quantized(written(tmp_path, granularity="per_channel"), fxquant.Budget(average_bits=6))
    assert len(set(result.program[WeightGrids].at("body", WeightFormat(8)).scale.tolist())) == 6
    one, own = (
        quantized(written(tmp_path, granularity=g), fxquant.Budget(average_bits=6)).costs["size"].values.sum()
        for g in ("per_tensor", "per_channel")
    )
    assert one < own


def test_a_saved_result_needs_the_file_no_more(tmp_path: Path) -> None:
    path = written(tmp_path)
    result = quantized(path, fxquant.Budget(average_bits=6))
    path.unlink()
    result.save(tmp_path / "saved")
    again = fxquant.load(tmp_path / "saved")
    torch.testing.assert_close(again.simulated(images(3)), result.simulated(images(3)), rtol=0, atol=0)
    assert fxquant.resolve(again, fxquant.Budget(latency_ms=2.5), progress=False).allocation.used["latency_ms"] <= 2.5
    with pytest.raises(OptionError, match="there is nothing to time"):
        bench(again)


def test_scores_belong_to_what_the_file_says(tmp_path: Path) -> None:
    def scored(path: Path) -> str:
        program = fxquant.prepare(fxquant.capture(small(), images()), Settings(bits=(8,), target=path))
        program = fxquant.calibrate(program, images(), progress=False)
        return score_identity(program, fxquant.CalibrationSet((images(),)), LOSSES["kl"])["settings"]

    (tmp_path / "elsewhere").mkdir()
    first = scored(written(tmp_path))
    assert scored(written(tmp_path / "elsewhere")) == first
    assert scored(written(tmp_path, joins=["add", "mul"])) != first


def test_mistakes_in_names_are_reported(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"runs_on='gpu' is unknown; known: reference"):
        backend(str(written(tmp_path, runs_on="gpu")))
    with pytest.raises(FileFormatError, match=r"[Nn]o such file"):
        backend(str(tmp_path / "missing.json"))
    with pytest.raises(OptionError, match=r"unknown target 'npu'; known: .*or a target file"):
        backend("npu")


def test_it_runs_in_the_backend_that_stands_in(tmp_path: Path) -> None:
    path = written(tmp_path, runs_on="reference")
    result = quantized(path, fxquant.Budget(average_bits=6))
    answer = backend(str(path)).compile(result.simulated, (images(3),))((images(3),))
    torch.testing.assert_close(answer, result.simulated(images(3)), rtol=0, atol=0.05)
    assert json.loads(path.read_text())["runs_on"] == "reference"
