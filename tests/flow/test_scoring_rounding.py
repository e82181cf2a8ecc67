"""Layers scored with weights rounded well at every width, from `quantize` to a loaded result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.facts import WeightGrids
from fxquant.core.ir import Grid
from fxquant.core.run import model_outputs
from fxquant.result import Result
from tests.small import images, small


def quantized(method: str, bits: tuple[int | str, ...] = (2, 4, 8)) -> Result:
    budget = fxquant.Budget(average_bits=4)
    return fxquant.quantize(
        small(),
        images(),
        budget,
        bits=bits,
        effort="fast",
        progress=False,
        target="reference",
        options={"scoring_rounding": method},
    )


def test_a_saved_result_keeps_them(tmp_path: Path) -> None:
    result = quantized("gptq")
    again = fxquant.load(result.save(tmp_path / "r"))
    assert again.program[WeightGrids].digest() == result.program[WeightGrids].digest()
    assert torch.equal(model_outputs(again.simulated, (images(),)), model_outputs(result.simulated, (images(),)))
    assert not (quantized("nearest").save(tmp_path / "r") / "rounded_weights.npz").exists()
    _ = result.save(tmp_path / "r")
    (tmp_path / "r" / "rounded_weights.npz").write_bytes(b"no archive")
    with pytest.raises(FileFormatError, match=r"rounded_weights\.npz"):
        fxquant.load(tmp_path / "r")


def test_loading_searches_for_no_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(*_: object, **__: object) -> None:
        raise AssertionError("a grid was searched for")

    result = quantized("gptq", (4, 8, "2c", "3p", "2.5r"))
    folder = result.save(tmp_path / "r")
    monkeypatch.setattr(Grid, "of_weight", searched)
    known, found = result.program[WeightGrids], fxquant.load(folder).program[WeightGrids]
    assert {site: set(grids) for site, grids in known.grids.items()} == {
        site: set(grids) for site, grids in found.grids.items()
    }
    for site, grids in known.grids.items():
        for weight, grid in grids.items():
            again = found.at(site, weight)
            assert again.spec == grid.spec
            for one, other in (
                (again.scale, grid.scale),
                (again.zero_point, grid.zero_point),
                (again.levels, grid.levels),
                (found.rounded[site, weight], known.rounded[site, weight]),
            ):
                assert one is other or (one is not None and other is not None and torch.equal(one, other))


def test_nearest_has_no_rounded_weights_and_one_digest() -> None:
    one, other = quantized("nearest"), quantized("nearest", (4, 8))
    assert one.program[WeightGrids].digest() == other.program[WeightGrids].digest()
    assert one.program[WeightGrids].digest() != quantized("gptq").program[WeightGrids].digest()


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(OptionError, match="unknown scoring_rounding 'gtpq'"):
        quantized("gtpq")


def test_without_images_weights_are_scored_at_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    program = fxquant.prepare(fxquant.capture(small(), images()))
    _ = program.module(images())
    assert not fxquant.calibrate(program)[WeightGrids].rounded
    assert "for want of calibration images" in capsys.readouterr().err
