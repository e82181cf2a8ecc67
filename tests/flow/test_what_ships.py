"""What leaves the engine: compared as it is rounded in the end, and nothing measured where nothing is to be chosen."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

import fxquant
from fxquant import flow
from fxquant.core.errors import InfeasibleBudgetError
from fxquant.core.facts import BitAllocation, Budget, Finalists, Rounding, Settings
from fxquant.core.ir import Choice, Program
from fxquant.core.run import CalibrationSet
from fxquant.flow import rounded_best
from fxquant.passes import MeasureSensitivity, Meter
from fxquant.result import Result
from tests.scoring import inputs, plain_net, scored
from tests.small import images, small

IMAGES = inputs("plain", 24)[0]


@cache
def quantized() -> Result:
    return fxquant.quantize(plain_net(), IMAGES, Budget(average_bits=4.5), options={"refine_moves": 4}, progress=False)


def final_loss(result: Result, plan: BitAllocation) -> float:
    """Return the loss that decides, of a plan rounded to the end as the settings say."""
    assert result.scoring is not None
    program = result.program.with_facts(plan)
    chain = result.program[Settings].rounding
    done = flow.round_plan(program, chain, result.scoring, result.held_out)[BitAllocation]
    assert done.measured_loss is not None
    return done.measured_loss


def test_a_result_is_not_worse_than_a_uniform_plan_rounded_alike() -> None:
    result = quantized()
    rivals = [plan for plan in result.finalists.values() if plan.status == "uniform"]
    assert rivals
    for rival in rivals:
        loss = result.allocation.measured_loss
        assert loss is not None
        assert loss <= final_loss(result, rival) * (1 + 1e-6)


def test_the_loss_of_a_result_is_that_of_the_model_it_holds() -> None:
    result = quantized()
    assert result.judging is not None
    assert len(result.judging) == len(IMAGES) * 5 // 4
    measured = Meter(result.program, result.judging, "kl").losses(result.allocation).mean()
    # A loss of 1e-6 nats is within a few of float32's roundings, which are other ones for batches of another size.
    assert result.allocation.measured_loss == pytest.approx(float(measured), rel=1e-4)


def test_another_budget_is_rounded_to_the_end_too(tmp_path: Path) -> None:
    known = fxquant.load(quantized().save(tmp_path / "r"))
    found = fxquant.resolve(known, Budget(average_bits=3), progress=False)
    assert found.program[Rounding].holds_for(found.allocation.choices)
    assert {unit.method for unit in found.program[Rounding].units} == {known.program[Settings].rounding}
    assert found.allocation.measured_loss == pytest.approx(final_loss(found, found.allocation), rel=1e-6)
    (plan,) = fxquant.pareto(known, [Budget(average_bits=3)])
    assert plan.measured_loss == found.allocation.measured_loss


@pytest.mark.parametrize(("gain", "winner"), [(0.5, "uniform W4A8"), (1.0, "diagonal")])
def test_a_uniform_plan_that_came_close_is_finished_as_well(gain: float, winner: str) -> None:
    """Rounding halves the uniform plan's loss, and does nothing for the other."""
    images_ = CalibrationSet(inputs("plain", 9))
    solved = flow.choose(scored("plain"), Budget(average_bits=4.5), images_)
    plans, losses = solved[Finalists].plans, {"diagonal": 1.0, "uniform W4A8": 1.2}
    chosen = BitAllocation(
        {**plans["uniform W4A8"].choices, "conv1": Choice(8, 8)}, "diagonal", measured_loss=1.0, finalists=losses
    )
    finished: list[str] = []

    def finish(program: Program) -> Program:
        plan = program[BitAllocation]
        finished.append(plan.estimator)
        assert plan.measured_loss is not None
        loss = plan.measured_loss * (gain if plan.status == "uniform" else 1.0)
        return program.with_facts(plan.remeasured(loss, len(images_)))

    assert rounded_best(solved.with_facts(chosen), finish)[BitAllocation].estimator == winner
    assert finished == ["diagonal", "uniform W4A8"]


@pytest.mark.parametrize(
    ("after", "winner", "tried"),
    [
        (0.3, "refined", ["refined"]),
        (0.2, "diagonal", ["refined", "diagonal", "uniform W4A8"]),
        (0.01, "refined", ["refined", "diagonal", "uniform W4A8"]),
    ],
)
def test_where_rounding_gains_most_of_the_loss_other_plans_are_finished(
    after: float, winner: str, tried: list[str]
) -> None:
    """What plans lost before rounding says little then: here the one that lost least ends behind another."""
    images_ = CalibrationSet(inputs("plain", 9))
    solved = flow.choose(scored("plain"), Budget(average_bits=4.5), images_)
    plans = solved[Finalists].plans
    assert {"diagonal", "uniform W4A8"} <= set(plans)
    chosen = BitAllocation(
        {**plans["uniform W4A8"].choices, "conv1": Choice(8, 8)},
        "refined",
        measured_loss=1.0,
        finalists={"diagonal": 3.0, "uniform W4A8": 5.0, "refined": 1.0},
    )
    assert chosen.choices != plans["diagonal"].choices
    finished: list[str] = []

    def finish(program: Program) -> Program:
        plan = program[BitAllocation]
        finished.append(plan.estimator)
        loss = {"refined": after, "diagonal": 0.05}.get(plan.estimator, 0.5)
        return program.with_facts(plan.remeasured(loss, len(images_)))

    assert rounded_best(solved.with_facts(chosen), finish)[BitAllocation].estimator == winner
    assert finished == tried


def test_where_nothing_is_to_be_chosen_nothing_is_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("scored")

    monkeypatch.setattr(MeasureSensitivity, "run", refuse)
    result = fxquant.quantize(small(), images(), Budget(average_bits=8), bits=[8], target="reference", progress=False)
    assert set(result.allocation.choices.values()) == {Choice(8, 8)}
    assert (result.allocation.status, result.sensitivity.evaluations) == ("optimal", 0.0)
    assert result.report_data()["outcome"]["measured_loss"] is not None
    again = fxquant.load(result.save(tmp_path / "r"))
    assert again.allocation == result.allocation
    with pytest.raises(InfeasibleBudgetError):
        fxquant.resolve(again, Budget(average_bits=4), progress=False)
