from __future__ import annotations

import math
from typing import Any

import pytest

from fxquant.report import HEIGHT, WIDTH, curve


def point(used: float, loss: float, **more: object) -> dict[str, Any]:
    known = {"name": "gram", "chosen": False, "uniform": False}
    return {**known, "used": used, "loss": loss, "bytes": 1e6 * used, **more}


def frontier(*points: dict[str, Any]) -> dict[str, Any]:
    return {"axis": "size_mb", "unit": "KL nats", "points": list(points)}


def test_equal_ratios_are_equal_lengths() -> None:
    drawn = curve(frontier(point(1, 1.0), point(2, 0.1), point(4, 0.01)))
    first, second, third = drawn["points"]
    assert second["x"] - first["x"] == pytest.approx(third["x"] - second["x"])
    assert second["y"] - first["y"] == pytest.approx(third["y"] - second["y"])
    assert 0 < first["x"] < third["x"] < WIDTH
    assert 0 < first["y"] < third["y"] < HEIGHT, "less loss lies lower"
    assert drawn["label"] == "MB"


def test_the_line_goes_down_along_the_best_plans() -> None:
    """A plan that costs more and loses more than one to its left lies beside the line."""
    drawn = curve(frontier(point(1, 1.0), point(2, 0.1), point(3, 0.5), point(3, 0.05), point(4, 0.2)))
    first, second, _, third, _ = drawn["points"]
    assert drawn["line"] == f"M{first['x']:.1f} {first['y']:.1f}" + "".join(
        f"H{p['x']:.1f}V{p['y']:.1f}" for p in (second, third)
    )


def test_ticks_stand_where_their_labels_say() -> None:
    drawn = curve(frontier(point(1, 1.0), point(4, 0.001)))
    first = drawn["points"][0]
    at = {float(tick["label"]): tick["at"] for tick in drawn["up"]}
    assert {1.0, 0.1, 0.01, 0.001} <= set(at)
    assert at[1.0] == pytest.approx(first["y"])
    across = {float(tick["label"]): tick["at"] for tick in drawn["across"]}
    assert across[1.0] == pytest.approx(first["x"])


def test_losses_below_zero_and_single_points_are_drawn() -> None:
    drawn = curve(frontier(point(1, 0.5), point(2, -0.1)))
    lowest = max(tick["at"] for tick in (*drawn["up"], {"at": drawn["points"][0]["y"]}))
    assert drawn["points"][1]["y"] >= lowest
    assert "-0.1" in drawn["points"][1]["title"], "the label tells the true value"
    for few in (frontier(), frontier(point(3, 0.0)), frontier(point(3, 0.2))):
        made = curve(few)
        assert all(math.isfinite(value) for each in made["points"] for value in (each["x"], each["y"]))


def test_chosen_and_uniform_plans_are_marked() -> None:
    drawn = curve(frontier(point(1, 1.0), point(2, 0.1, chosen=True), point(2, 0.2, name="uniform W4A8", uniform=True)))
    assert [each["kind"] for each in drawn["points"]] == ["accent", "hot", "bf"]
    assert [each["label"] for each in drawn["points"]] == ["", "", "uniform W4A8"]
