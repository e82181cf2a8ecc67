"""Allocation on measured scores against every plan there is: all budgets, ties of activations, sites in float."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from fxquant.core.errors import InfeasibleBudgetError
from fxquant.core.facts import BitAllocation, Budget, CostTable, CostTables, SensitivityMatrix, Surrogates, fits, usage
from fxquant.core.ir import FLOAT, Choice, Program, Site, Sites
from fxquant.passes import AllocateBits, simulate, uniform_plans
from tests.programs import check_pass
from tests.scoring import scored

Plan = dict[str, Choice]

BUDGETS = [
    Budget(average_bits=2.0),
    Budget(average_bits=4.0),
    Budget(average_bits=5.5),
    Budget(size_mb=0.0006),
    Budget(size_ratio=0.4),
    Budget(bops=400_000.0),
    Budget(bops_ratio=0.02),
    Budget(latency_ms=1.85),
    Budget(latency_ratio=0.4),
    Budget(average_bits=6.0, bops_ratio=0.04, size_ratio=0.6),
    Budget(average_bits=5.0, latency_ms=1.9, size_mb=0.001),
]


def with_latency(program: Program) -> Program:
    """Add a made-up table of milliseconds, so that no clock decides what these tests see."""
    candidates = program[Sites].candidates
    values = np.array([1.0 if c.choice.is_float else 0.25 + c.choice.weight_bits / 64 for c in candidates])
    table = CostTable(candidates, values, 0.5, 5.0, "milliseconds")
    return program.with_facts(CostTables({**program[CostTables].tables, "latency": table}))


def agree(sites: Sites, plan: Plan) -> bool:
    """Whether the integer sites that read one value take it at one width."""
    widths: dict[str, set[int]] = {}
    for site in sites.sites:
        if not plan[site.name].is_float:
            widths.setdefault(site.input_tie, set()).add(plan[site.name].activation_bits)
    return all(len(found) == 1 for found in widths.values())


def best(program: Program, budget: Budget) -> float:
    """Return the least modelled loss of all plans within the budget."""
    sites, tables = program[Sites], program[CostTables]
    names = [site.name for site in sites.sites]
    plans = (dict(zip(names, picked, strict=True)) for picked in product(*(s.choices for s in sites.sites)))
    kept = (p for p in plans if agree(sites, p) and fits(p, budget.limits, tables))
    return min(program[SensitivityMatrix].predict(p) for p in kept)


@pytest.mark.parametrize("solver", ["iqp", "exhaustive"])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_every_kind_of_budget(budget: Budget, solver: str) -> None:
    program = with_latency(scored("plain"))
    optimum = best(program, budget)
    plan = check_pass(AllocateBits(budget, solver), program)[BitAllocation]
    assert plan.objective == pytest.approx(optimum, rel=1e-6, abs=1e-12)
    assert plan.objective == pytest.approx(program[SensitivityMatrix].predict(plan.choices))
    assert (plan.estimator, plan.limits) == (program[SensitivityMatrix].estimator, budget.limits)
    assert plan.bound <= optimum * (1 + 1e-6) + 1e-12
    assert plan.status == "optimal"
    assert plan.used == usage(plan.choices, budget.limits, program[CostTables])
    assert all(slack >= -1e-9 * plan.limits[name] for name, slack in plan.slack.items())


@pytest.mark.parametrize("bits", [(4, 8), (4, 8, 32)])
@pytest.mark.parametrize("limit", [4.0, 6.5, 12.0])
def test_tied_sites_agree_and_nothing_better_is_lost(bits: tuple[int, ...], limit: float) -> None:
    program, budget = scored("plain", bits, (4, 8)), Budget(average_bits=limit, bops_ratio=0.5)
    plan = AllocateBits(budget)(program)[BitAllocation]
    assert agree(program[Sites], plan.choices)
    assert plan.objective == pytest.approx(best(program, budget), rel=1e-6, abs=1e-12)
    simulate(program, plan)


def wishing(program: Program, wishes: Plan, otherwise: Choice) -> Program:
    """Return the program with scores of 1 wherever a site does not get what is wished for it."""
    values = np.diag([float(wishes.get(c.site, otherwise) != c.choice) for c in program[Sites].candidates])
    matrix = replace(program[SensitivityMatrix], values=values)
    return program.with_facts(matrix, Surrogates({"wishes": matrix}))


def test_a_tie_can_cost_the_better_plan() -> None:
    program = scored("plain", (4, 8), (4, 8))
    sites = program[Sites]
    assert sites.by_name("conv2").input_tie == sites.by_name("conv3").input_tie
    wanted = {"conv2": Choice(8, 4), "conv3": Choice(8, 8)}
    plan = AllocateBits(Budget(average_bits=8))(wishing(program, wanted, Choice(8, 8)))[BitAllocation]
    assert plan.objective == pytest.approx(1.0)
    assert agree(sites, plan.choices)


def test_a_site_in_float_ties_no_other() -> None:
    program = scored("plain", (4, 8, 32), (4, 8))
    wanted = {"conv2": FLOAT, "conv3": Choice(8, 4)}
    plan = AllocateBits(Budget(average_bits=32))(wishing(program, wanted, Choice(8, 8)))[BitAllocation]
    assert {name: plan.choices[name] for name in wanted} == wanted
    simulate(program, plan)


@pytest.mark.parametrize("budget", [Budget(average_bits=1.9), Budget(size_mb=1e-5), Budget(bops_ratio=1e-4)], ids=str)
def test_an_infeasible_budget_names_the_reachable_range(budget: Budget) -> None:
    program = scored("plain")
    (name, limit), sites = next(iter(budget.limits.items())), program[Sites].sites
    low, high = (
        usage({s.name: Choice(bits, 8) for s in sites}, budget.limits, program[CostTables])[name] for bits in (2, 8)
    )
    with pytest.raises(InfeasibleBudgetError) as error:
        AllocateBits(budget)(program)
    assert f"{name}={limit:g} (reachable: {low:.4g} to {high:.4g})" in str(error.value)
    assert "allow narrower bits" in str(error.value)


@pytest.mark.parametrize("name", ["size_ratio", "size_mb", "bops_ratio", "average_bits"])
def test_the_lowest_reachable_budget_is_kept(name: str) -> None:
    program = scored("plain")
    narrow = {s.name: Choice(2, 8) for s in program[Sites].sites}
    least = usage(narrow, {name: 1.0}, program[CostTables])[name]
    assert AllocateBits(Budget.of({name: least}))(program)[BitAllocation].choices == narrow


def site(name: str, tie: str, *choices: Choice) -> Site:
    return Site(name, "conv", f"{name}.weight", (name,), 1, 1, 0, 1, tie, choices)


def test_uniform_plans() -> None:
    left = site("left", "x", Choice(8, 8))
    # One that breaks a tie is left out.
    sites = (left, site("right", "x", Choice(4, 4), Choice(4, 8), Choice(8, 8)))
    assert list(uniform_plans(sites)) == ["uniform W4A8", "uniform W8A8"]
    sites = (left, site("right", "x", Choice(4, 8), FLOAT))
    assert uniform_plans(sites)["uniform float"] == {"left": Choice(8, 8), "right": FLOAT}


def test_a_limit_on_the_peak_of_the_activations() -> None:
    program = scored("plain", (4, 8, 32), (4, 8))
    table = program[CostTables]["activation"]
    names = [s.name for s in program[Sites].sites]
    peaks = sorted(
        {table.of(dict(zip(names, row, strict=True))) for row in product(*(s.choices for s in program[Sites].sites))}
    )
    assert len(peaks) > 2
    for limit in peaks[:-1]:
        budget = Budget(activation_mb=limit / 1e6, average_bits=20)
        plan = AllocateBits(budget)(program)[BitAllocation]
        assert plan.objective == pytest.approx(best(program, budget), rel=1e-6, abs=1e-12)
        assert table.of(plan.choices) <= limit * (1 + 1e-9)
    with pytest.raises(InfeasibleBudgetError, match=r"activation_mb=1e-06 \(reachable: [0-9.]+ to [0-9.]+\)"):
        AllocateBits(Budget(activation_mb=1e-6))(program)
