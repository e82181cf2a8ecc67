"""The demo end to end, on fewer images so that it stays quick; the table's promise is measured in full by a person."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import fxquant
from fxquant.cli import main
from fxquant.demo import DigitsData, digits_data, run


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    def fewer() -> DigitsData:
        data = digits_data()
        return replace(
            data,
            calibration=data.calibration[:24],
            held_out=data.held_out[:200],
            held_out_labels=data.held_out_labels[:200],
        )

    monkeypatch.setattr(run, "digits_data", fewer)
    monkeypatch.setattr(run, "ROUNDS", 3)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_demo_compares_four_models_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((out / "report.json").read_text())["measured"]["comparison"]}
    assert list(rows) == ["float", "uniform W8A8", "uniform W4A8", "mixed"]
    assert all(name in printed for name in rows)
    assert rows["mixed"]["bytes"] == (out / "model.onnx").stat().st_size
    assert (
        rows["mixed"]["bytes"]
        # Tables of codebooks are unpacked by a few more ops.
        <= 1.01 * rows["uniform W4A8"]["bytes"]
        < rows["uniform W8A8"]["bytes"]
        < rows["float"]["bytes"] / 3
    )
    assert rows["float"]["accuracy"] > 0.97
    assert rows["mixed"]["accuracy"] > 0.95
    assert rows["uniform W8A8"]["accuracy"] >= rows["float"]["accuracy"] - 0.01
    assert "1000 held-out" not in (out / "report.html").read_text()
    assert fxquant.load(out).allocation.used["average_bits"] <= 4.0


@pytest.mark.slow
def test_demo_out_of_reach_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path / "out"), "--budget", "size_mb=0.001"]) == 3
    assert "reachable" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
