from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.passes.allocation import SOLVERS, BoolArray, FloatArray, fill
from tests.passes.allocation.instances import golden_instance, golden_problems, needs_data

GROUPS = [np.array([0, 1, 2]), np.array([3, 4, 5])]
WIDTHS = np.array([[2.0], [4.0], [8.0]] * 2)
DIAGONAL = np.array([9.0, 3.0, 1.0, 5.0, 4.0, 0.0])
COSTS = np.array([[2.0, 4.0, 8.0, 2.0, 4.0, 8.0]])
NO_TIES = np.zeros((0, 6)), np.zeros(0)


def narrow() -> BoolArray:
    return np.array([True, False, False, True, False, False])


def filled(limit: float, diagonal: FloatArray = DIAGONAL) -> list[int]:
    return list(np.flatnonzero(fill(diagonal, GROUPS, COSTS, np.array([limit]), *NO_TIES, WIDTHS, narrow())))


def test_the_largest_fall_per_cost_comes_first() -> None:
    assert filled(4) == [0, 3], "nothing fits"
    assert filled(6) == [1, 3], "6 for 2 against 1 for 2"
    assert filled(8) == [1, 4]
    assert filled(12) == [1, 5], "after the first step, 4 for 6 of the second group fits only now"
    assert filled(16) == [2, 5]


def test_only_what_lowers_the_loss_is_widened() -> None:
    assert filled(16, np.array([1.0, 1.0, 2.0, 0.0, 0.1, 0.2])) == [0, 3]


def test_what_costs_nothing_is_taken_and_narrowing_is_not() -> None:
    costs = np.array([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0]])
    widths = np.array([[2.0, 8.0], [4.0, 8.0], [2.0, 4.0], [2.0, 8.0], [2.0, 4.0], [4.0, 4.0]])
    plan = fill(np.array([5.0, 4, 0, 5, 0, 0]), GROUPS, costs, np.array([2.0]), *NO_TIES, widths, narrow())
    assert list(np.flatnonzero(plan)) == [1, 3], "a narrower activation is no gain, whatever the scores say"


@needs_data
def test_what_is_left_of_a_golden_problem_buys_nothing() -> None:
    # HAWQ-v3's ResNet-18 at half the range of sizes: .715 MB are left, and each layer at 4 bits would take 1.125.
    (problem,) = (
        p for p in golden_problems() if (p["network"], p["cost"], p["fraction"]) == ("resnet18", "size_mb", 0.5)
    )
    instance = golden_instance(problem)
    best = SOLVERS["linear"](*instance.arguments).choice
    assert float(instance.limits[0] - instance.costs[0] @ best) > 0.7
    widths = np.array([[4.0], [8.0]] * len(instance.groups))
    rows, sides = instance.costs, instance.limits
    ties = rows[1:], sides[1:]
    wider = fill(np.diag(instance.values), instance.groups, rows[:1], sides[:1], *ties, widths, best)
    assert np.array_equal(wider, best)


def test_ties_hold() -> None:
    ties = np.array([[0.0, 0, 1, 0, 0, -1], [0.0, 0, -1, 0, 0, 1]])
    plan = fill(DIAGONAL, GROUPS, COSTS, np.array([16.0]), ties, np.zeros(2), WIDTHS, narrow())
    assert list(np.flatnonzero(plan)) == [1, 4], "both would have to go to 8 bits at once"


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_limits_hold_one_choice_each_and_costs_never_fall(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 4, draw.integers(1, 6))
    starts = np.cumsum([0, *sizes])
    groups = [np.arange(a, b) for a, b in pairwise(starts)]
    count = int(starts[-1])
    costs, diagonal = draw.uniform(0, 1, (int(draw.integers(0, 4)), count)), draw.normal(size=count)
    ties = draw.integers(-1, 2, (int(draw.integers(0, 3)), count)).astype(float)
    widths = draw.integers(2, 9, (count, 2)).astype(float)
    plan = np.zeros(count, dtype=bool)
    plan[[draw.choice(group) for group in groups]] = True
    limits = costs[:, plan].sum(axis=1) + draw.uniform(0, 1, len(costs))
    sides = ties[:, plan].sum(axis=1) + draw.integers(0, 2, len(ties))
    before = plan.copy()
    found = fill(diagonal, groups, costs, limits, ties, sides, widths, plan)
    assert np.array_equal(plan, before), "the input plan stays as it is"
    assert all(found[group].sum() == 1 for group in groups)
    assert (costs[:, found].sum(axis=1) <= limits + 1e-9).all()
    assert (ties[:, found].sum(axis=1) <= sides + 1e-9).all()
    assert (costs[:, found].sum(axis=1) >= costs[:, plan].sum(axis=1) - 1e-12).all()
    assert (widths[found] >= widths[plan]).all()
    moved = ~np.array([np.array_equal(found[group], plan[group]) for group in groups])
    assert (diagonal[found][moved] < diagonal[plan][moved]).all()
    again = fill(diagonal, groups, costs, limits, ties, sides, widths, found)
    assert np.array_equal(again, found), "nothing more fits"
    nothing = fill(diagonal, groups, costs, costs[:, plan].sum(axis=1), ties, sides, np.zeros_like(widths), plan)
    assert np.array_equal(nothing, plan)
