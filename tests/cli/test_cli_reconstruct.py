"""`fxquant reconstruct`: a saved result rounded better, in place or beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fxquant
from fxquant.cli import main
from fxquant.core.facts import Rounding

MODEL, IMAGES = "tests.small:small", "tests.small:images"
TUNED = ["--rounding", "gptq+adaround", "--rounding-option", "iterations=5", "--rounding-option", "batch=4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "saved"
    arguments = ["--model", MODEL, "--calibration", IMAGES, "--output", str(folder), "--target", "reference"]
    assert main(["quantize", *arguments, "--budget", "average_bits=3", "--effort", "fast", "--quiet"]) == 0
    return folder


@pytest.fixture
def saved(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "saved"))


def test_a_result_is_rounded_in_place_and_goes_on_from_its_units(saved: Path) -> None:
    before = (saved / "plan.json").read_text()
    assert main(["reconstruct", str(saved), "--calibration", IMAGES, *TUNED, "--quiet"]) == 0
    result = fxquant.load(saved)
    known = Rounding.of(result.program, result.allocation.choices)
    assert {unit.method for unit in known.units} == {"gptq", "adaround"}
    assert (saved / "plan.json").read_text() != before
    cells = {path: path.stat().st_mtime_ns for path in (saved / "rounding").rglob("adaround-*.npz")}
    assert cells
    assert main(["reconstruct", str(saved), "--calibration", IMAGES, *TUNED, "--quiet"]) == 0
    assert {path: path.stat().st_mtime_ns for path in cells} == cells


def test_elsewhere_leaves_the_saved_one_as_it_was(saved: Path, tmp_path: Path) -> None:
    before = (saved / "plan.json").read_text()
    arguments = [str(saved), "--calibration", IMAGES, *TUNED, "--output", str(tmp_path / "other"), "--quiet"]
    assert main(["reconstruct", *arguments]) == 0
    assert (saved / "plan.json").read_text() == before
    assert "gptq" in (tmp_path / "other" / "report.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounding", "gptk"], "unknown rounding 'gptk' (did you mean 'gptq'?)"),
        (["--rounding", "adaround", "--rounding-option", "iteration=5"], "did you mean 'iterations'?"),
        (["--rounding", "adaround", "--rounding-option", "batch=400"], "draws 400 images a step"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    saved: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _ = capsys.readouterr()
    assert main(["reconstruct", str(saved), "--calibration", IMAGES, *arguments, "--quiet"]) == 2
    assert message in capsys.readouterr().err
