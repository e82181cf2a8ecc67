from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import fxquant
from fxquant import Budget
from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, BudgetCurve, CostTables, SensitivityMatrix, Settings
from fxquant.core.ir import Program, Sites
from fxquant.core.run import CalibrationSet, model_outputs
from fxquant.flow import measure_curve
from fxquant.passes import measured_loss, simulate, uniform_plans
from fxquant.passes.allocation import SOLVERS, Solution
from tests.scoring import inputs, scored
from tests.small import images, small

HELD_OUT = CalibrationSet(inputs("plain", 8))
POINTS = 5


@cache
def program() -> Program:
    known = scored("plain")
    return known.with_facts(replace(known[Settings], curve=POINTS))


@cache
def plans(**limits: float) -> dict[str, BitAllocation]:
    return measure_curve(program(), Budget.of(limits) if limits else None, HELD_OUT).plans


def test_each_point_is_the_best_of_all_plans_within_its_limit_and_measured() -> None:
    table, matrix, sites = program()[CostTables]["average_bits"], program()[SensitivityMatrix], program()[Sites].sites
    names = [site.name for site in sites]
    every = [dict(zip(names, each, strict=True)) for each in product(*(site.choices for site in sites))]
    solved = {name: plan for name, plan in plans(average_bits=5).items() if not name.startswith("uniform")}
    assert 3 <= len(solved) <= POINTS
    reference = model_outputs(program().module, HELD_OUT.inputs)
    for plan in solved.values():
        within = [each for each in every if table.of(each) <= plan.limits["average_bits"]]
        assert plan.objective == pytest.approx(min(map(matrix.predict, within)), rel=1e-6)
        loss = measured_loss(simulate(program(), plan).module, HELD_OUT, reference, "kl")
        assert plan.measured_loss == pytest.approx(loss, rel=1e-4)
        assert (plan.images, plan.loss) == (8, "kl")


def test_the_range_is_that_of_the_cost_and_uniform_plans_stand_beside() -> None:
    uniform = uniform_plans(program()[Sites].sites)
    for found in (plans(average_bits=5), plans()):
        assert set(uniform) <= set(found)
    assert "average_bits 2" in plans(average_bits=5)
    assert all(name.startswith(("size_mb ", "uniform ")) for name in plans())
    by_answers = measure_curve(program(), Budget(loss=1.0, minimize="bops_ratio"), HELD_OUT).plans
    assert all(name.startswith(("bops_ratio ", "uniform ")) for name in by_answers)


def test_other_limits_hold_as_asked() -> None:
    table = program()[CostTables]["bops"]
    ends = [table.of(plan.choices) for plan in plans(average_bits=5).values()]
    room = (min(ends) + max(ends)) / 2
    for name, plan in plans(average_bits=5, bops=room).items():
        assert name.startswith("uniform ") or (name.startswith("average_bits ") and plan.used["bops"] <= room)


def test_solves_share_a_few_seconds_and_nothing_asked_is_nothing_done(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[float] = []

    def hurried(*arguments: Any, **options: Any) -> Solution:
        allowed.append(options["time_limit"])
        return iqp(*arguments, **options)

    iqp = SOLVERS["iqp"]
    monkeypatch.setitem(SOLVERS._entries, "iqp", hurried)
    measure_curve(program(), None, HELD_OUT)
    assert sum(allowed) <= 6.001
    assert len(allowed) == POINTS
    without = program().with_facts(replace(program()[Settings], curve=0))
    assert measure_curve(without, None, HELD_OUT).plans == {}
    assert len(allowed) == POINTS


def test_it_is_kept_with_the_result_and_other_plans_join_it(tmp_path: Path) -> None:
    options = {"target": "reference", "effort": "fast", "curve": 4}
    result = fxquant.quantize(small(), images(), {"average_bits": 5}, options=options, progress=False)
    curve = result.program[BudgetCurve].plans
    assert len(curve) >= 5
    loaded = fxquant.load(result.save(tmp_path))
    assert {name: plan.to_json() for name, plan in loaded.program[BudgetCurve].plans.items()} == {
        name: plan.to_json() for name, plan in curve.items()
    }
    # The same plans serve other budgets of the result; other images measure them again.
    again = fxquant.resolve(loaded, {"average_bits": 3}, progress=False)
    assert again.program[BudgetCurve] == loaded.program[BudgetCurve]
    moved = fxquant.resolve(loaded, {"average_bits": 3}, held_out=images(12), progress=False)
    assert {plan.images for plan in moved.program[BudgetCurve].plans.values()} == {24}
    (plan,) = fxquant.pareto(result, ["average_bits=3"])
    assert result.with_curve([plan]).program[BudgetCurve].plans == {**curve, "average_bits=3": plan}
    with pytest.raises(OptionError, match="no measured loss"):
        result.with_curve([BitAllocation(plan.choices)])


@pytest.mark.parametrize(
    ("budget", "count"), [(None, 4), ({"average_bits": 5}, 5), ({"disagreement": 0.9, "minimize": "average_bits"}, 5)]
)
def test_each_stage_is_numbered_and_comes(
    budget: dict[str, Any] | None, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounding to nearest is no stage."""
    options = {"target": "reference", "effort": "fast", "curve": 2, "rounding": "nearest"}
    _ = fxquant.quantize(small(), images(), budget, options=options)
    said = re.findall(r"^(\d) of (\d): ", capsys.readouterr().err, re.MULTILINE)
    assert said == [(str(number), str(count)) for number in range(1, count + 1)]
