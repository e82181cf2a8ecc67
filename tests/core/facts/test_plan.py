from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.facts import BitAllocation
from fxquant.core.ir import FLOAT, Choice

PLAN = BitAllocation(
    choices={"conv": Choice(4, 8), "fc": Choice(8, 8), "stem": FLOAT},
    estimator="gram",
    objective=0.25,
    bound=0.2,
    gap=0.2,
    status="feasible",
    used={"size_mb": 0.5, "average_bits": 4.5},
    limits={"size_mb": 0.75, "average_bits": 4.5},
    measured_loss=0.3,
    finalists={"gram": 0.3, "uniform W4A8": 0.5},
    loss="kl",
    minimized="size_mb",
    images=24,
    quality={"loss": 0.3},
    quality_bounds={"loss": 0.4},
    quality_limits={"loss": 0.5},
    quality_images=96,
)


def test_a_plan_reads_back_from_file_and_values(tmp_path: Path) -> None:
    document = PLAN.to_json(tmp_path / "plan.json")
    assert BitAllocation.from_json(tmp_path / "plan.json") == PLAN
    assert BitAllocation.from_json(str(tmp_path / "plan.json")) == PLAN
    assert BitAllocation.from_json(document) == PLAN
    assert PLAN.slack == {"size_mb": 0.25, "average_bits": 0.0}


def test_better_weights_leave_the_loss_that_plans_were_compared_by() -> None:
    once = PLAN.remeasured(0.2, 12)
    assert (once.measured_loss, once.images, once.compared_loss) == (0.2, 12, 0.3)
    assert (once.remeasured(0.1, 9).measured_loss, once.remeasured(0.1, 9).compared_loss) == (0.1, 0.3)
    assert BitAllocation.from_json(once.to_json()) == once


def test_a_hand_made_plan_has_no_numbers(tmp_path: Path) -> None:
    plan = BitAllocation({"fc": Choice(2, 8)})
    plan.to_json(tmp_path / "plan.json")
    back = BitAllocation.from_json(tmp_path / "plan.json")
    assert back.choices == plan.choices
    assert back.status == "manual"
    assert back.measured_loss is None
    assert all(math.isnan(value) for value in (back.objective, back.bound, back.gap))
    assert back.slack == {}


NO_CHOICES: list[Any] = ["remove", {}, [], None]


def edited(tmp_path: Path, change: dict[str, Any]) -> Path:
    path = tmp_path / "plan.json"
    PLAN.to_json(path)
    document = json.loads(path.read_text())
    document.update(change)
    path.write_text(json.dumps({k: v for k, v in document.items() if v != "remove"}))
    return path


def test_an_edit_by_hand_is_taken(tmp_path: Path) -> None:
    path = edited(tmp_path, {"choices": {"conv": "W2A8", "fc": "float"}, "status": "manual", "used": "remove"})
    plan = BitAllocation.from_json(path)
    assert plan.choices == {"conv": Choice(2, 8), "fc": FLOAT}
    assert plan.used == {}


@pytest.mark.parametrize(
    "change",
    [
        *[{"choices": wrong} for wrong in NO_CHOICES],
        *[{"choices": {"conv": wrong}} for wrong in ("W4A", 4, None, "W1A8", "W32A8")],
        {"status": "perfect"},
        {"objective": "low"},
        {"used": {"size_mb": "x"}},
        {"used": [1]},
        {"limits": None},
        {"measured_loss": {}},
    ],
)
def test_an_edit_that_makes_no_sense_names_the_file(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(FileFormatError, match=r"plan\.json"):
        BitAllocation.from_json(edited(tmp_path, change))


def test_plans_are_checked_when_made() -> None:
    with pytest.raises(OptionError, match="at least one site"):
        BitAllocation({})
    with pytest.raises(OptionError, match="status 'done' is unknown; allowed: optimal"):
        BitAllocation({"fc": FLOAT}, status="done")


def test_one_line_about_a_plan() -> None:
    plan = BitAllocation({"fc": FLOAT}, objective=0.25, status="optimal", used={"size_mb": 1.5}, measured_loss=0.5)
    assert plan.summary() == "optimal, loss 0.25, measured 0.5, size_mb 1.5"
    assert BitAllocation({"fc": FLOAT}, objective=0.25).summary() == "manual, loss 0.25"
