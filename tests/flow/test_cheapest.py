from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import fxquant
from fxquant import flow
from fxquant.core.errors import CalibrationError, InfeasibleBudgetError
from fxquant.core.facts import BitAllocation, Budget, CostTables, usage
from fxquant.core.host import Reporter
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import CalibrationSet
from fxquant.flow import cheapest, choose
from fxquant.passes import simulate
from fxquant.report import summary
from tests.scoring import inputs, scored
from tests.small import images, small

HELD_OUT = CalibrationSet(inputs("plain", 16))


def cost(program: Program, name: str = "size_ratio") -> float:
    return usage(program[BitAllocation].choices, {name: 1.0}, program[CostTables])[name]


def loss_at(**limits: float) -> float:
    measured = choose(scored("plain"), Budget.of(limits), HELD_OUT)[BitAllocation].measured_loss
    assert measured is not None
    return measured


def test_the_cheapest_plan_that_keeps_the_loss_is_found() -> None:
    """Every plan of a handful of layers is measured: none that is cheaper by more than the tolerance keeps it."""
    program = scored("plain")
    limit = loss_at(average_bits=4.5)
    found = choose(program, Budget(loss=limit * 1.001), HELD_OUT)
    plan = found[BitAllocation]
    assert plan.quality["loss"] <= limit * 1.001
    assert plan.quality_limits == {"loss": limit * 1.001}
    assert cost(found) <= cost(choose(program, Budget(average_bits=4.5), HELD_OUT)) * 1.01


def test_tighter_limits_cost_more() -> None:
    program = scored("plain")
    loose, tight = (choose(program, Budget(loss=value), HELD_OUT) for value in (2.0, loss_at(average_bits=7)))
    assert cost(loose) < cost(tight)


def test_a_limit_every_plan_keeps_gives_the_cheapest_plan() -> None:
    found = choose(scored("plain"), Budget(disagreement=1, minimize="average_bits"), HELD_OUT)
    assert set(found[BitAllocation].choices.values()) == {Choice(2, 8)}
    assert found[BitAllocation].used["average_bits"] == pytest.approx(2)


def test_limits_on_costs_hold_along_with_it() -> None:
    found = choose(scored("plain"), Budget(loss=2.0, bops_ratio=0.05, average_bits=6), HELD_OUT)
    assert found[BitAllocation].used["bops_ratio"] <= 0.05
    assert found[BitAllocation].used["average_bits"] <= 6


def test_a_limit_no_plan_keeps_names_the_best() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"no plan keeps loss=1e-12.*the widest measured loss=.*raise the"):
        choose(scored("plain"), Budget(loss=1e-12), HELD_OUT)
    with pytest.raises(InfeasibleBudgetError, match="average_bits=1"):
        choose(scored("plain"), Budget(loss=1.0, average_bits=1), HELD_OUT)


def test_answers_need_images_and_labels() -> None:
    with pytest.raises(CalibrationError, match="a limit on loss needs held-out images"):
        choose(scored("plain"), Budget(loss=1.0), None)
    with pytest.raises(CalibrationError, match="one label for each image"):
        choose(scored("plain"), Budget(accuracy_drop=0.1), HELD_OUT)


def test_missing_labels_are_reported_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "prepare", lambda *_: pytest.fail("worked first"))
    with pytest.raises(CalibrationError, match="one label for each image"):
        fxquant.quantize(small(), images(), Budget(accuracy_drop=0.1), target="reference", progress=False)


def test_answers_are_judged_as_the_plan_is_handed_back() -> None:
    """A finish that spoils every plan leaves none that keeps the limit by it; the plain plan is taken where it does."""
    program = scored("plain")
    limit = loss_at(average_bits=5)

    def spoil(solved: Program) -> Program:
        narrow = {site.name: Choice(2, 8) for site in solved[Sites].sites}
        return solved.with_facts(BitAllocation(narrow))

    found = choose(program, Budget(loss=limit * 1.01), HELD_OUT, finish=spoil)
    assert found[BitAllocation].quality["loss"] <= limit * 1.01
    assert set(found[BitAllocation].choices.values()) != {Choice(2, 8)}
    assert simulate(found, found[BitAllocation]).module is not None


def test_a_plan_scored_around_itself_that_breaks_the_limit_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, solve = loss_at(average_bits=4.5) * 1.001, cheapest.search.allocate

    def breaking(program: Program, budget: Budget, held_out: Any, reporter: Any, around: Any, folder: Any) -> Program:
        solved = solve(program, budget, held_out, reporter, None, folder)
        narrow = {site.name: Choice(2, 8) for site in program[Sites].sites}
        return solved if around is None else solved.with_facts(replace(solved[BitAllocation], choices=narrow))

    monkeypatch.setattr(cheapest.search, "allocate", breaking)
    found = choose(scored("plain"), Budget(loss=limit), HELD_OUT, Reporter(False), HELD_OUT)
    assert found[BitAllocation].quality["loss"] <= limit


def test_each_step_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    choose(scored("plain"), Budget(loss=2.0), HELD_OUT, Reporter(True))
    printed = capsys.readouterr().err
    assert "size_ratio within" in printed
    assert "on 16 held-out images, kept" in printed


def test_from_the_front_door_to_the_summary() -> None:
    budget = Budget(disagreement=0.2)
    result = fxquant.quantize(small(), images(), budget, target="reference", effort="fast", progress=False)
    assert result.allocation.quality["disagreement"] <= 0.2
    assert "Budget disagreement:" in summary(result.program)
    again = BitAllocation.from_json(result.allocation.to_json())
    assert again.quality == result.allocation.quality
    loose = fxquant.resolve(result, Budget(disagreement=1), progress=False)
    assert loose.allocation.quality_limits == {"disagreement": 1}
