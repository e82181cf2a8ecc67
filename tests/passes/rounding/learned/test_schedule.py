"""Where time is short, the units that lose most are tuned, and a resumed run tunes the same ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fxquant.core.facts import Rounding
from fxquant.core.storage import ScoreStore
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.rounding.learned import affordable, engine
from tests.passes.rounding.tasks import images, task_of


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [(0.5, set()), (1.0, {3}), (3.0, {0, 3}), (4.0, {0, 1, 3}), (6.9, {0, 1, 3}), (7.0, {0, 1, 2, 3})],
)
def test_units_are_taken_by_what_they_add_to_the_loss(seconds: float, chosen: set[int]) -> None:
    """Increments .5, .1, -.1 and .7; costs 2, 1, 3 and 1."""
    assert affordable([0.5, 0.6, 0.5, 1.2], [2.0, 1.0, 3.0, 1.0], seconds) == chosen


def test_a_unit_that_does_not_fit_is_passed_over() -> None:
    assert affordable([1.0, 1.5], [5.0, 1.0], 2.0) == {1}


def short(seconds: float) -> dict[str, object]:
    return {"iterations": 4, "batch": 4, "seconds": seconds}


def test_units_that_are_left_out_stay_as_they_were_and_are_named() -> None:
    given = replace(task_of("plain", 2, held_out=images("plain", 6)), overrides=short(1e-9))
    found = ROUNDERS["brecq"](given)[Rounding]
    assert not any(unit.kept for unit in found.units)
    assert all("not tuned: seconds=1e-09" in unit.reason for unit in found.units)
    assert any("conv1, conv2, fc stayed" in note for note in found.notes)
    nearest = given.simulated().module
    for site, weight in found.weights.items():
        rounded = nearest.get_submodule(f"quantize_{site}_weight")(nearest.get_parameter(f"{site}.weight"))
        assert torch.equal(weight, rounded)


def test_with_time_for_all_the_result_is_the_same_as_without_a_limit() -> None:
    given = task_of("plain", 2, held_out=images("plain", 6))
    one, other = (
        ROUNDERS["brecq"](replace(given, store=ScoreStore(None, {}), overrides=short(seconds)))[Rounding]
        for seconds in (0.0, 1e6)
    )
    assert all(torch.equal(one.weights[site], other.weights[site]) for site in one.weights)
    assert not other.notes


def test_a_resumed_run_keeps_to_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = task_of("plain", 2, held_out=images("plain", 6))
    given = replace(given, store=ScoreStore(tmp_path, {}), overrides=short(1e-9))
    first = ROUNDERS["brecq"](given)[Rounding]
    for cell in tmp_path.glob("brecq-00*"):
        cell.unlink()
    # A faster machine would have time for all of them.
    monkeypatch.setattr(engine.Reconstructor, "_priced", lambda _: pytest.fail("timed again"))
    again = ROUNDERS["brecq"](replace(given, store=ScoreStore(tmp_path, {})))[Rounding]
    assert [unit.reason for unit in again.units] == [unit.reason for unit in first.units]
