from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.core.errors import OptionError
from fxquant.passes.allocation import Clock, Problem, cheapest_within, error_ratios, solve_exhaustive, solve_threshold

GROUPS = [np.array([0, 1, 2]), np.array([3, 4, 5])]
ERRORS = np.diag([90.0, 6, 1, 40, 10, 2])
"""2, 4 and 8 bits of two layers: the errors are 90, 6 and 1 times, and 20, 5 and 1 times that of 8 bits."""
BITS = np.array([[2.0, 4, 8, 2, 4, 8]])


@pytest.mark.parametrize(
    ("limit", "widths", "k"),
    [(16, [8, 8], 1), (15, [8, 4], 5), (12, [8, 4], 5), (11, [4, 4], 6), (7, [4, 2], 20), (5, [2, 2], 90)],
)
def test_the_smallest_widths_within_the_least_k_by_hand(limit: int, widths: list[int], k: int) -> None:
    found = solve_threshold(ERRORS, GROUPS, BITS, [limit])
    assert BITS[0, found.choice].tolist() == widths
    assert found.status != "infeasible"
    assert found.notes == (f"threshold: every layer's error is within k = {k} of that of its widest choice",)


def random_problem(seed: int, layers: int, rows: int) -> Problem:
    """Errors that fall by width, as those of tensors of any shape do, and costs that rise."""
    random = np.random.default_rng(seed)
    errors = np.sort(random.lognormal(sigma=3.0, size=(layers, 4)), axis=1)[:, ::-1]
    costs = np.outer(random.uniform(0.1, 9, rows * layers), [2.0, 3, 4, 8]).reshape(rows, -1)
    groups = tuple(np.arange(4 * k, 4 * k + 4) for k in range(layers))
    least, most = (costs[:, edge::4].sum(axis=1) for edge in (0, 3))
    return Problem(np.diag(errors.reshape(-1)), groups, costs, least + random.uniform(0, 1, rows) * (most - least))


@given(seed=st.integers(0, 10**6), layers=st.integers(1, 6), rows=st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_the_budget_is_met_by_the_least_largest_ratio(seed: int, layers: int, rows: int) -> None:
    problem = random_problem(seed, layers, rows)
    found = solve_threshold(problem.values, problem.groups, problem.costs, problem.limits)
    assert problem.feasible(found.choice)
    ratios = error_ratios(problem)
    largest = float(ratios[found.choice].max())
    # No plan of a smaller largest ratio keeps the limits: the values of a minimax, tried one by one.
    strict = np.where(ratios < largest * (1 - 1e-9), 0.0, 1.0)
    best = solve_exhaustive(np.diag(strict), problem.groups, problem.costs, problem.limits)
    assert best.objective > 0


@given(seed=st.integers(0, 10**6), layers=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_errors_rise_and_costs_fall_with_k(seed: int, layers: int) -> None:
    problem = random_problem(seed, layers, 1)
    loose = Problem(problem.values, problem.groups, problem.costs, problem.costs.sum(axis=1))
    ratios = error_ratios(loose)
    plans = [cheapest_within(loose, ratios, float(k), Clock(60.0)) for k in np.unique(ratios)]
    errors = [loose.objective(plan) for plan in plans if plan is not None]
    costs = [float(loose.costs[0, plan].sum()) for plan in plans if plan is not None]
    assert len(errors) == len(plans)
    assert errors == sorted(errors)
    assert costs == sorted(costs, reverse=True)
    # Each layer by itself: the smallest width within k.
    for k, plan in zip(np.unique(ratios), plans, strict=True):
        for group in loose.groups:
            assert plan is not None
            assert group[plan[group]] == next(index for index in group if ratios[index] <= k)


def test_two_layers_that_must_agree() -> None:
    ties = np.array([[1.0, 0, 0, -1, 0, 0], [0, 1, 0, 0, -1, 0], [0, 0, 1, 0, 0, -1]])
    rows, sides = np.concatenate([BITS, ties, -ties]), np.array([12.0, *[0.0] * 6])
    found = solve_threshold(ERRORS, GROUPS, rows, sides)
    assert BITS[0, found.choice].tolist() == [4, 4]
    assert "k = 6 " in found.notes[0]


def test_float_has_no_error_and_is_no_reference() -> None:
    problem = Problem.checked(np.diag([6.0, 2, 0, 9, 3, 0]), GROUPS, BITS, [16])
    assert error_ratios(problem).tolist() == [3, 1, 0, 3, 1, 0]
    assert error_ratios(Problem.checked(np.zeros((6, 6)), GROUPS, BITS, [16])).tolist() == [0] * 6


def test_errors_below_zero_are_refused() -> None:
    with pytest.raises(OptionError, match="errors of at least 0"):
        solve_threshold(-ERRORS, GROUPS, BITS, [16])
    with pytest.raises(OptionError, match="pair terms"):
        solve_threshold(ERRORS + 0.1, GROUPS, BITS, [16])
