from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fxquant.core.facts import CostTables, Settings
from fxquant.core.ir import FLOAT, Choice, Sites
from fxquant.core.run import CalibrationSet
from fxquant.flow import measure_latency
from tests.scoring import calibrated, inputs

IMAGES = CalibrationSet(inputs("residual", 2))


def test_times_of_this_machine_are_kept_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path))
    program = calibrated("residual", (4, 8, 32), (8,))
    program = program.with_facts(replace(program[Settings], target="reference", threads=1))
    table = measure_latency(program, IMAGES)[CostTables]["latency"]
    again = measure_latency(program, IMAGES)[CostTables]["latency"]
    assert (again.values == table.values).all()
    assert again.noise == table.noise
    names = [site.name for site in program[Sites].sites]
    for choice in (FLOAT, Choice(8, 8)):
        assert table.of(dict.fromkeys(names, choice)) > 0
    files = {path.read_text() for path in tmp_path.rglob("*.json")}
    assert files
    assert all('"target": "reference"' in text and '"threads": "1"' in text and '"cpu"' in text for text in files)
