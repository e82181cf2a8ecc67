from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fxquant.core.errors import CalibrationError, InfeasibleBudgetError, OptionError
from fxquant.core.facts import BitAllocation, Budget, CostTable, CostTables, Settings
from fxquant.core.ir import FLOAT, Choice, Program, Sites
from fxquant.core.run import CalibrationSet
from fxquant.flow import allocate as search
from fxquant.passes import Meter, VerifyAndRefine
from fxquant.passes.allocation import Step
from tests.models import MODELS
from tests.scoring import inputs, scored

IMAGES = CalibrationSet(MODELS["residual"].inputs(6))


def test_milliseconds_need_an_image() -> None:
    with pytest.raises(CalibrationError, match="latency budget needs one image"):
        search.allocate(scored("plain"), Budget(latency_ms=5))


def test_a_plan_slower_than_predicted_is_tightened_until_the_clock_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def measured(program: Program, plan: BitAllocation, images: CalibrationSet) -> dict[str, float]:
        del program, images
        asked.append(plan.limits["latency_ms"])
        return {"latency_ms": 20.0 if len(asked) < 3 else 9.0, "latency_ratio": 0.5}

    monkeypatch.setattr(search, "measured_latency", measured)
    done = search.allocate(with_latency(1e-3), Budget(latency_ms=10, average_bits=5), IMAGES)
    assert asked == [10, 5, 2.5]
    assert done[BitAllocation].used["latency_ms"] == 9.0
    assert done[BitAllocation].limits == {"latency_ms": 10, "average_bits": 5}


def test_a_latency_that_no_plan_keeps_on_the_clock_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "measured_latency", lambda *_: {"latency_ms": 30.0, "latency_ratio": 2.0})
    with pytest.raises(
        InfeasibleBudgetError, match=r"latency_ms=10 when measured; the fastest of \d+ took latency_ms=30"
    ):
        search.allocate(with_latency(1e-3), Budget(latency_ms=10), IMAGES)


@pytest.mark.parametrize("tightens", [True, False])
def test_a_finalist_that_keeps_the_clock_is_taken_before_refusing(
    monkeypatch: pytest.MonkeyPatch, tightens: bool
) -> None:
    """Whether the tightened limit is out of reach at once, or four rounds of it do not help."""
    program = with_latency(1e-3 if tightens else 1.0)
    limit = 10.0 if tightens else 4.0 * len(program[Sites].sites)
    fast = {site.name: Choice(4, 8) for site in program[Sites].sites}
    asked: list[BitAllocation] = []

    def measured(program: Program, plan: BitAllocation, images: CalibrationSet) -> dict[str, float]:
        del program, images
        asked.append(plan)
        return {"latency_ms": limit * (0.9 if plan.choices == fast else 1e6), "latency_ratio": 0.5}

    monkeypatch.setattr(search, "measured_latency", measured)
    done = search.allocate(program, Budget(latency_ms=limit, average_bits=5), IMAGES)[BitAllocation]
    assert done.choices == fast
    assert done.used["latency_ms"] == limit * 0.9
    assert done.limits == {"latency_ms": limit, "average_bits": 5}
    assert done.measured_loss == done.finalists[done.estimator]
    # No plan is clocked twice once the finalists are gone through, the least loss first.
    fallbacks = [plan for plan in asked if plan.choices != asked[0].choices]
    keys = [str(plan.choices) for plan in fallbacks]
    assert len(set(keys)) == len(keys)
    losses = [plan.measured_loss or 0.0 for plan in fallbacks]
    assert losses == sorted(losses)


def test_a_plan_that_quantizes_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "measured_latency", lambda *_: {"latency_ms": 1.0, "latency_ratio": 1.0})
    floats = {site.name: FLOAT for site in scored("residual")[Sites].sites}
    solve = search._solve

    def all_float(*arguments: Any) -> Program:
        return solve(*arguments).with_facts(BitAllocation(floats))

    monkeypatch.setattr(search, "_solve", all_float)
    with pytest.raises(OptionError, match="met by the float model as it is"):
        search.allocate(scored("residual"), Budget(average_bits=8), IMAGES)


def with_latency(per_layer: float) -> Program:
    """Return a scored program whose table says each layer takes `per_layer` milliseconds at any precision."""
    program = scored("residual")
    candidates = program[Sites].candidates
    table = CostTable(candidates, np.full(len(candidates), per_layer), 0.0, 1.0, "milliseconds")
    return program.with_facts(CostTables({**program[CostTables].tables, "latency": table}))


def test_the_plan_is_refined_as_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[VerifyAndRefine] = []

    def watched(*arguments: Any, **options: Any) -> VerifyAndRefine:
        seen.append(VerifyAndRefine(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(search, "VerifyAndRefine", watched)
    program = scored("plain")
    for moves, cost in ((0, 0.0), (3, 0.5)):
        settings = replace(program[Settings], refine_moves=moves, requantization_cost=cost)
        done = search.allocate(program.with_facts(settings), Budget(average_bits=4), CalibrationSet(inputs("plain", 6)))
        assert (seen[-1].moves, seen[-1].requantization_cost) == (moves, cost)
        assert moves or "refined" not in done[BitAllocation].finalists


def around(rounds: int, moves: int = 0) -> Program:
    """Return a scored program whose plan will be scored again around itself."""
    program = scored("residual")
    return program.with_facts(replace(program[Settings], rounds=rounds, refine_moves=moves, time_limit=5.0))


def test_scoring_around_the_plan_is_listed_and_never_hurts() -> None:
    scoring, held_out = CalibrationSet(inputs("residual", 6)), CalibrationSet(inputs("residual", 9))
    budget = Budget(average_bits=4)
    before, done = (search.allocate(around(r), budget, held_out, scoring=scoring)[BitAllocation] for r in (0, 2))
    tried = {name: loss for name, loss in done.finalists.items() if name.startswith("round ")}
    assert tried
    assert not any(name.startswith("round ") for name in before.finalists)
    assert before.measured_loss is not None
    assert done.measured_loss is not None
    assert done.measured_loss <= before.measured_loss
    assert done.used["average_bits"] <= 4
    if done.choices != before.choices:
        assert done.estimator.endswith("around the plan")
        assert done.measured_loss in tried.values()


def test_a_better_plan_near_the_one_in_hand_is_found() -> None:
    """Handed a plan that spends its bits badly, the search around it repairs it."""
    program = around(3)
    sites = program[Sites].sites
    bad = {site.name: Choice(8 if k % 2 else 2, 8) for k, site in enumerate(sites)}
    limits = program[CostTables]["average_bits"].of(bad)
    plan = BitAllocation(bad, limits={"average_bits": limits})
    images = CalibrationSet(inputs("residual", 16))
    start = program.with_facts(plan)
    done = search.rescore_around(start, Budget(average_bits=limits), images, Meter(start, images, "kl"))[BitAllocation]
    assert done.finalists
    assert done.choices != bad
    assert done.measured_loss is not None


def test_what_requantization_costs_counts_around_the_plan_and_is_not_reported_as_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, images = around(1), CalibrationSet(inputs("residual", 9))
    start = BitAllocation({site.name: Choice(4, 8) for site in program[Sites].sites})
    trial = BitAllocation({site.name: Choice(8, 8) for site in program[Sites].sites}, border_cost=2.0)
    seen: list[float] = []

    def region(plan: BitAllocation, score: Any, solve: Any, measure: Any, *others: Any, **options: Any) -> Any:
        del score, solve, others, options
        for each in (plan, trial, replace(trial, border_cost=0.0)):
            seen.append(float(measure(each).mean()))
        return trial, [Step(1, 3, trial, measure(trial), True)]

    monkeypatch.setattr(search, "trust_region", region)
    meter = Meter(program, images, "kl")
    done = search.rescore_around(program.with_facts(start), Budget(average_bits=8), images, meter)[BitAllocation]
    assert seen[1] == pytest.approx(seen[2] + 2.0)
    assert seen[2] < seen[0] < 2.0
    assert done.measured_loss == done.finalists["round 1, 3 sites"] == seen[2]


def test_without_scoring_images_nothing_is_scored_again() -> None:
    done = search.allocate(around(2), Budget(average_bits=3), CalibrationSet(inputs("residual", 9)))[BitAllocation]
    assert not any(name.startswith("round ") for name in done.finalists)
