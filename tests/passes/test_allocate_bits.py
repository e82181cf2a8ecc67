from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, Budget, Finalists, SensitivityMatrix, Surrogates
from fxquant.core.ir import Choice, Program, Sites
from fxquant.passes import AllocateBits, EstimateCost, FindSites, uniform_plans
from fxquant.passes.allocation import SOLVERS, Solution
from tests.programs import TARGET, check_pass, tied


@cache
def scored(name: str = "residual", activation_bits: tuple[int, ...] = (8,)) -> Program:
    """Return a program with random sensitivities, fewer bits hurting more."""
    program = EstimateCost(TARGET)(FindSites(TARGET, (2, 4, 8), activation_bits)(tied(name)))
    candidates = program[Sites].candidates
    draw = np.random.default_rng(0)
    hurt = np.array([1.0 / (c.choice.weight_bits * c.choice.activation_bits) for c in candidates])
    hurt *= draw.uniform(0.5, 2.0, len(candidates))
    factor = draw.normal(size=(len(candidates), 3)) * hurt[:, None] * 0.3
    other = np.array([[a.site != b.site for b in candidates] for a in candidates])
    values = np.diag(hurt) + (factor @ factor.T) * other
    values = (values + values.T) / 2
    one = SensitivityMatrix(candidates, values, np.zeros_like(values), "pairs", 1.0, "KL nats")
    diagonal = SensitivityMatrix(
        candidates, np.diag(np.diag(values)), np.zeros_like(values), "diagonal", 1.0, "KL nats"
    )
    return program.with_facts(Surrogates({"pairs": one, "diagonal": diagonal}))


def test_finalists_are_the_surrogates_plans_and_the_uniform_ones_that_fit() -> None:
    plans = AllocateBits(Budget(average_bits=4.0))(scored())[Finalists].plans
    assert list(plans) == ["pairs", "diagonal", "uniform W2A8", "uniform W4A8"]
    assert plans["uniform W4A8"].status == "uniform"
    assert set(plans["uniform W4A8"].choices.values()) == {Choice(4, 8)}


def test_a_cost_that_was_not_measured() -> None:
    with pytest.raises(OptionError, match="cost 'latency' was not estimated"):
        AllocateBits(Budget(latency_ms=1.0))(scored())


def test_uniform_plans_widen_where_a_site_is_pinned() -> None:
    program = FindSites(TARGET, (2, 4), (8,), pins={"fc": Choice(8, 8)})(tied("residual"))
    plans = uniform_plans(program[Sites].sites)
    assert plans["uniform W2A8"]["fc"] == Choice(8, 8)
    assert plans["uniform W2A8"]["conv1"] == Choice(2, 8)
    assert plans["uniform W8A8"]["conv1"] == Choice(4, 8), "its widest"


@pytest.mark.parametrize("solver", ["iqp", "exhaustive"])
def test_dear_borders_make_activations_uniform(solver: str) -> None:
    program, budget = scored("residual", (4, 8)), Budget(bops_ratio=0.03)
    matrix = program[Surrogates].matrices["pairs"]
    free = AllocateBits(budget, solver)(program)[BitAllocation]
    assert free.border_cost == 0.0
    assert len({free.choices[name].activation_bits for name in ("conv1", "conv2", "conv3")}) == 2
    dear = AllocateBits(budget, solver, requantization_cost=100.0)(program)[BitAllocation]
    assert len({dear.choices[name].activation_bits for name in ("conv1", "conv2", "conv3")}) == 1
    assert dear.border_cost == 0.0
    assert dear.objective == pytest.approx(matrix.predict(dear.choices))
    assert dear.objective > free.objective
    # A price in between: the cost is kept apart from the loss, and together they are the least of all plans.
    price = (dear.objective - free.objective) / 8
    between = AllocateBits(budget, solver, requantization_cost=price)(program)[BitAllocation]
    total = between.objective + between.border_cost
    assert between.objective == pytest.approx(matrix.predict(between.choices))
    assert between.status == "optimal"
    assert between.bound == pytest.approx(total)
    assert between.gap == 0.0
    assert total <= min(dear.objective, free.objective + 3 * price) + 1e-12
    assert between.border_cost > 0.0


def test_without_a_cost_of_borders_the_solver_sees_the_matrix_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    program, seen = scored("residual", (4, 8)), []

    def watched(values: np.ndarray[tuple[int, int], np.dtype[np.float64]], *rest: Any, **options: Any) -> Solution:
        seen.append(values)
        return SOLVERS["exhaustive"](values, *rest, **options)

    monkeypatch.setitem(SOLVERS._entries, "watched", watched)
    AllocateBits(Budget(bops_ratio=0.03), "watched")(program)
    AllocateBits(Budget(bops_ratio=0.03), "watched", requantization_cost=1.0)(program)
    matrices = list(program[Surrogates].matrices.values())
    assert all(np.array_equal(values, matrix.values) for values, matrix in zip(seen[:2], matrices, strict=True))
    assert not np.array_equal(seen[2], matrices[0].values)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_a_cost_of_borders_out_of_range(cost: float) -> None:
    with pytest.raises(OptionError, match=r"requantization_cost=.* must be a finite number of at least 0"):
        AllocateBits(Budget(average_bits=4), requantization_cost=cost)


def with_pair_terms(program: Program, diagonal: list[float], pair: float) -> Program:
    """Return the program with one matrix: these diagonals per site, and a price on two sites both wide."""
    candidates = program[Sites].candidates
    values = np.diag(np.array(diagonal * len(program[Sites].sites)))
    for i, one in enumerate(candidates):
        for j, other in enumerate(candidates):
            if one.site != other.site and one.choice == other.choice == Choice(8, 8):
                values[i, j] = pair
    matrix = SensitivityMatrix(candidates, values, np.zeros_like(values), "doubtful", 1.0, "KL nats")
    return program.with_facts(Surrogates({"doubtful": matrix}))


def test_what_is_left_over_makes_a_further_finalist() -> None:
    """Pair terms that speak against wide sites leave room; the diagonal alone would use it, so both are measured."""
    program = with_pair_terms(scored(), [3.0, 2.0, 1.0], 5.0)
    done = check_pass(AllocateBits(Budget(average_bits=8)), program)
    plan, finalists = done[BitAllocation], done[Finalists].plans
    filled = finalists["doubtful, filled"]
    assert plan.choices == finalists["doubtful"].choices
    assert sorted(c.weight_bits for c in plan.choices.values()) == [4, 4, 4, 8]
    assert set(filled.choices.values()) == {Choice(8, 8)}
    assert (filled.status, filled.estimator) == ("measured", "doubtful, filled")
    assert filled.objective == program[Surrogates].matrices["doubtful"].predict(filled.choices) > plan.objective
    assert filled.used == {"average_bits": pytest.approx(8.0)}
    assert list(finalists) == ["doubtful", "doubtful, filled", *[f"uniform W{b}A8" for b in (2, 4, 8)]]


def test_a_plan_with_nothing_left_over_stays_alone() -> None:
    program = with_pair_terms(scored(), [3.0, 2.0, 1.0], 0.0)
    assert [n for n in AllocateBits(Budget(average_bits=8))(program)[Finalists].plans if "filled" in n] == []
    unwilling = with_pair_terms(scored(), [1.0, 2.0, 3.0], 0.0)
    assert [n for n in AllocateBits(Budget(average_bits=8))(unwilling)[Finalists].plans if "filled" in n] == []


@pytest.mark.parametrize("radius", [1, 2])
def test_near_a_plan_as_many_sites_change_as_the_radius_allows(radius: int) -> None:
    start = BitAllocation({site.name: Choice(2, 8) for site in scored()[Sites].sites})
    near = AllocateBits(Budget(average_bits=8.0), near=(start, radius))(scored())[Finalists].plans["pairs"]
    assert sum(near.choices[name] != choice for name, choice in start.choices.items()) == radius
