from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from fxquant.core.ir import FLOAT, Choice, Sites
from fxquant.passes.allocation import SOLVERS, Solution
from fxquant.report import POINTS, axis, frontier, render
from tests.small import small_result


def every_plan() -> list[dict[str, Choice]]:
    sites = small_result().program[Sites].sites
    return [dict(zip((s.name for s in sites), each, strict=True)) for each in product(*(s.choices for s in sites))]


def average_bits(plan: dict[str, Choice]) -> float:
    sites = small_result().program[Sites].sites
    return sum(s.weight_count * plan[s.name].weight_bits for s in sites) / sum(s.weight_count for s in sites)


def test_each_point_is_the_best_of_all_plans_within_its_limit() -> None:
    result, drawn = small_result(), frontier(small_result().program)
    assert drawn["axis"] == "average_bits"
    assert len(drawn["points"]) == POINTS
    assert [drawn["points"][0]["limit"], drawn["points"][-1]["limit"]] == [2.0, pytest.approx(8.0)]
    for point in drawn["points"]:
        within = [plan for plan in every_plan() if average_bits(plan) <= point["limit"] * (1 + 1e-6)]
        best = min(within, key=result.sensitivity.predict)
        assert point["status"] == "optimal"
        assert point["gap"] == pytest.approx(0.0, abs=1e-9)
        assert point["loss"] == pytest.approx(result.sensitivity.predict(best))
        if point["used"] == pytest.approx(average_bits(best)):
            assert point["bytes"] == result.costs["size"].of(best)
    assert len({point["loss"] for point in drawn["points"]}) > 3


def test_chosen_and_uniform_plans_stand_beside_the_curve() -> None:
    result, drawn = small_result(), frontier(small_result().program)
    choices = result.allocation.choices
    assert drawn["chosen"] == {
        "used": pytest.approx(average_bits(choices)),
        "loss": result.sensitivity.predict(choices),
        "bytes": result.costs["size"].of(choices),
    }
    assert {row["name"]: row["used"] for row in drawn["beside"]} == {
        "uniform W2A8": 2.0,
        "uniform W4A8": 4.0,
        "uniform W8A8": 8.0,
    }


def test_without_a_budget_the_curve_runs_along_bytes() -> None:
    drawn = frontier(small_result(budget=None).program)
    assert drawn["axis"] == axis(small_result(budget=None).program) == "size_mb"
    for point in drawn["points"]:
        assert point["used"] == pytest.approx(point["bytes"] / 1e6)
        assert point["used"] <= point["limit"] * (1 + 1e-6)


def test_other_limits_hold_as_asked() -> None:
    result = small_result()
    room = result.costs["size"].of(result.allocation.choices) / 1e6
    plan = replace(result.allocation, limits={"average_bits": 5.0, "size_mb": room})
    drawn = frontier(result.program.with_facts(plan))
    assert drawn["axis"] == "average_bits"
    assert max(point["bytes"] for point in drawn["points"]) <= room * 1e6
    assert max(point["bytes"] for point in frontier(result.program)["points"]) > room * 1e6


def test_a_layer_put_in_float_by_hand_has_no_place_on_the_curve() -> None:
    result = small_result()
    plan = replace(result.allocation, choices={**result.allocation.choices, "head": FLOAT})
    drawn = frontier(result.with_plan(plan).program)
    assert drawn["chosen"] is None
    assert drawn["points"]


def test_out_of_time_leaves_points_out_and_says_so() -> None:
    drawn = frontier(small_result().program, seconds=-1.0)
    assert drawn["points"] == []
    assert drawn["left_out"] == POINTS


def test_plans_that_were_not_proved_in_time_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    def hurried(*arguments: Any, **options: Any) -> Solution:
        assert 0.0 < options["time_limit"] < 1.0
        return replace(iqp(*arguments, **options), status="feasible", gap=0.25)

    iqp = SOLVERS["iqp"]
    monkeypatch.setitem(SOLVERS._entries, "iqp", hurried)
    drawn = frontier(small_result().program)
    assert {(point["status"], point["gap"]) for point in drawn["points"]} == {("feasible", 0.25)}
    assert "feasible, gap 25.0 %" in render({**small_result().report_data(), "frontier": drawn})
