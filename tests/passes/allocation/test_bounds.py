from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.passes.allocation import SOLVERS, Clock, Lift, Problem, Solution, Subproblem, certify, cold, reduce, relax
from tests.passes.allocation.instances import Instance, random_instance, random_instances


def reduced_with_optimum(instance: Instance) -> tuple[Problem, Solution] | None:
    reduced = reduce(Problem.checked(*instance.arguments))
    if reduced is None:
        return None
    problem = reduced.problem
    optimum = SOLVERS["exhaustive"](problem.values, problem.groups, problem.costs, problem.limits)
    return None if optimum.status == "infeasible" else (problem, optimum)


@settings(max_examples=60, deadline=None)
@given(random_instances(), st.integers(0, 2**32 - 1), st.floats(-3, 2), st.booleans())
def test_any_multipliers_give_a_valid_bound(instance: Instance, seed: int, size: float, of_equations: bool) -> None:
    case = reduced_with_optimum(instance)
    if case is None:
        return
    problem, optimum = case
    sub = Subproblem.whole(problem)
    lift = Lift.of(sub)
    noise = np.random.default_rng(seed).normal(size=lift.objective.shape) * 10**size
    multipliers = (noise + noise.T) / 2
    if of_equations:
        # Multipliers of the equations alone: no eigenvalue term hides an error in the other terms.
        inside = lift.basis @ lift.basis.T
        multipliers = multipliers - inside @ multipliers @ inside
    certificate = certify(sub, lift, multipliers)
    assert certificate.bound <= optimum.objective + 1e-9 * abs(optimum.objective) + 1e-12
    # The bound with a choice fixed must not exclude that choice of the optimal plan.
    held = certificate.with_choice[optimum.choice]
    assert (held <= optimum.objective + 1e-9 * abs(optimum.objective) + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(random_instances(), st.integers(1, 120))
def test_relaxation_bound_is_valid_wherever_it_stops(instance: Instance, iterations: int) -> None:
    case = reduced_with_optimum(instance)
    if case is None:
        return
    problem, optimum = case
    sub = Subproblem.whole(problem)
    relaxed = relax(sub, Lift.of(sub), cold(sub), iterations, Clock(10))
    tolerance = 1e-9 * abs(optimum.objective) + 1e-12
    assert relaxed.certificate.bound <= optimum.objective + tolerance
    assert (relaxed.certificate.with_choice[optimum.choice] <= optimum.objective + tolerance).all()


def test_relaxation_is_tight_where_the_matrix_is_diagonal_and_no_limit_binds() -> None:
    instance = random_instance(3, groups=6, rows=0, kind="diagonal", tightness=1.0)
    case = reduced_with_optimum(instance)
    assert case is not None
    sub = Subproblem.whole(case[0])
    relaxed = relax(sub, Lift.of(sub), cold(sub), 300, Clock(10))
    assert relaxed.certificate.bound == pytest.approx(case[1].objective, rel=1e-6)


def test_relaxation_beats_the_eigenvalue_shift() -> None:
    """The free entries inside groups and the limit's products are worth more than lambda_min alone."""
    for seed in range(5):
        instance = random_instance(seed, groups=6, rows=1, kind="indefinite", tightness=0.5)
        case = reduced_with_optimum(instance)
        assert case is not None
        problem, optimum = case
        sub = Subproblem.whole(problem)
        relaxed = relax(sub, Lift.of(sub), cold(sub), 400, Clock(10))
        # x' (values - lambda_min I) x >= 0 and |x|^2 = groups give the crude bound.
        crude = min(float(np.linalg.eigvalsh(problem.values)[0]), 0.0) * len(problem.groups)
        assert crude <= relaxed.certificate.bound <= optimum.objective + 1e-9 * abs(optimum.objective)
        assert optimum.objective - relaxed.certificate.bound < 0.5 * (optimum.objective - crude)


@settings(max_examples=40, deadline=None)
@given(random_instances(), st.integers(0, 2**32 - 1))
def test_restriction_keeps_objectives_and_transfers_plans(instance: Instance, seed: int) -> None:
    case = reduced_with_optimum(instance)
    if case is None:
        return
    problem, optimum = case
    sub = Subproblem.whole(problem)
    # Any set of kept choices that holds the optimal plan leaves the optimum in place.
    keep = optimum.choice | (np.random.default_rng(seed).random(len(sub.names)) < 0.5)
    outcome = sub.restrict(keep)
    assert outcome is not None
    smaller, transfer = outcome
    plan = np.isin(smaller.names, np.flatnonzero(optimum.choice))
    lifted = np.concatenate([[1.0], plan])
    assert lifted @ smaller.matrix @ lifted == pytest.approx(optimum.objective, rel=1e-9, abs=1e-12)
    assert np.array_equal(smaller.full_plan(np.flatnonzero(plan)), np.flatnonzero(optimum.choice))
    slack = (smaller.limits - smaller.costs @ plan) / np.maximum(smaller.units, 1e-300)
    before = transfer @ np.concatenate([lifted, slack])
    assert before[1 : 1 + len(sub.names)] == pytest.approx(optimum.choice.astype(float))
    expected = (sub.limits - sub.costs @ optimum.choice) / np.maximum(sub.units, 1e-300)
    assert before[1 + len(sub.names) :] == pytest.approx(expected, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(random_instances())
def test_the_lifted_plan_lies_in_the_range_of_the_basis(instance: Instance) -> None:
    case = reduced_with_optimum(instance)
    if case is None:
        return
    problem, optimum = case
    sub = Subproblem.whole(problem)
    lift = Lift.of(sub)
    slack = (sub.limits - sub.costs @ optimum.choice) / np.maximum(sub.units, 1e-300)
    lifted = np.concatenate([[1.0], optimum.choice, slack])
    assert lift.basis @ (lift.basis.T @ lifted) == pytest.approx(lifted, abs=1e-9)
    assert lifted @ lifted <= lift.trace + 1e-9
    assert lifted @ lift.objective @ lifted * lift.scale == pytest.approx(optimum.objective, rel=1e-9, abs=1e-12)


def test_products_with_a_fixed_choice_count_in_both_halves_of_the_matrix() -> None:
    pairs = np.zeros((4, 4))
    pairs[1, 2] = pairs[2, 1] = 3.0
    groups = [np.array([0, 1]), np.array([2, 3])]
    problem = Problem.checked(np.eye(4), groups, np.zeros((1, 4)), [10.0], {0: pairs})
    smaller = Subproblem.whole(problem).restrict(np.array([False, True, True, True]))
    assert smaller is not None
    assert smaller[0].costs.tolist() == [[problem.row_sums(np.array([1, 2]))[0], 0.0]] == [[6.0, 0.0]]
