from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.passes.allocation import swaps

GROUPS = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5])]
COSTS = np.array([[1.0, 2.0, 1.0, 2.0, 1.0, 2.0]])
START = np.array([True, False, False, True, True, False])


def names(limit: float, *diagonals: list[float]) -> list[tuple[int, ...]]:
    matrices = [np.diag(np.array(diagonal)) for diagonal in diagonals]
    return [tuple(np.flatnonzero(p)) for p in swaps(matrices, GROUPS, COSTS, np.array([limit]), START)]


def test_what_fits_comes_in_the_order_of_the_prediction() -> None:
    # From narrow, wide, narrow at a limit of one wide group: exchanges with the second, or the second narrowed.
    assert names(4, [9, 1, 5, 0, 3, 2]) == [(1, 2, 4), (0, 2, 5), (0, 2, 4)]
    assert (1, 3, 5) in names(5.0 + 1, [9, 1, 5, 0, 3, 2]), "two in one direction where it fits"
    assert names(3, [1.0] * 6) == [(0, 2, 4)], "only narrowing keeps a limit below the plan's cost"
    assert names(2, [1.0] * 6) == []


def test_no_model_hides_what_another_one_believes_in() -> None:
    one, other = [9.0, 1, 5, 0, 3, 2], [3.0, 2, 5, 0, 9, 1]
    assert set(names(4, one, other)[:2]) == {(1, 2, 4), (0, 2, 5)}
    # What one ranks first and the other last but one stands before what both rank in the middle.
    assert names(6, [7.0, 5, 4, 2, 2, 0], [0.0, 0, 1, 7, 5, 8])[:2] == [(1, 2, 4), (1, 3, 5)]
    assert names(4, one, one) == names(4, one)
    assert names(4, one, [x * 1000 for x in one]) == names(4, one)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_all_plans_within_two_groups_in_the_order_of_one_model(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 4, draw.integers(1, 5))
    starts = np.cumsum([0, *sizes])
    groups = [np.arange(a, a + n) for a, n in zip(starts, sizes, strict=False)]
    count = int(starts[-1])
    values = draw.normal(size=(count, count))
    values = values + values.T
    for group in groups:
        block = np.ix_(group, group)
        values[block] = np.diag(np.diag(values[block]))
    start = np.zeros(count, dtype=bool)
    start[[draw.choice(group) for group in groups]] = True
    costs = draw.uniform(-1, 1, (2, count))
    limits = costs[:, start].sum(axis=1) + draw.uniform(0, 1, 2)
    expected = []
    for row in product(*groups):
        plan = np.zeros(count, dtype=bool)
        plan[list(row)] = True
        distance = sum(not np.array_equal(plan[group], start[group]) for group in groups)
        if 1 <= distance <= 2 and (costs[:, plan].sum(axis=1) <= limits).all():
            expected.append((float(values[np.ix_(row, row)].sum()), tuple(row)))
    found = [tuple(np.flatnonzero(plan)) for plan in swaps([values], groups, costs, limits, start)]
    assert found == [row for _, row in sorted(expected)]


def test_one_group_has_single_moves_only() -> None:
    found = swaps(
        [np.diag([3.0, 1.0, 2.0])], [np.arange(3)], np.zeros((0, 3)), np.zeros(0), np.array([True, False, False])
    )
    assert [int(np.flatnonzero(plan)[0]) for plan in found] == [1, 2]
    assert next(swaps([np.eye(1)], [np.arange(1)], np.zeros((0, 1)), np.zeros(0), np.ones(1, bool)), None) is None


def test_unusable_arrays() -> None:
    with pytest.raises(Exception, match="values"):
        next(swaps([np.full((2, 2), np.nan)], [np.arange(2)], np.zeros((0, 2)), np.zeros(0), np.array([True, False])))
