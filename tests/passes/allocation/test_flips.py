from __future__ import annotations

import numpy as np
import pytest

from fxquant.core.errors import SolverError
from fxquant.passes.allocation import SOLVERS
from tests.passes.allocation.instances import random_instance
from tests.passes.allocation.test_solvers import assert_sound

GROUPS = [np.array([0, 1, 2]), np.array([3, 4, 5])]
NOISE = np.diag([9.0, 2.0, 0.5, 30.0, 1.0, 0.1])
"""Choices of 2, 4 and 8 bytes in each group."""
COSTS = np.array([[2.0, 4.0, 8.0, 2.0, 4.0, 8.0]])


@pytest.mark.parametrize(
    ("limit", "chosen"),
    [
        (16.0, [2, 5]),
        # In order of noise: 0.5 and 0.1 stand, 1.0 flips the second group to 4, 2.0 the first, 9.0 the first to 2.
        (12.0, [2, 4]),
        (10.0, [1, 4]),
        (8.0, [1, 4]),
        (7.0, [0, 4]),
        (6.0, [0, 4]),
        (4.0, [0, 3]),
    ],
)
def test_flips_in_order_of_noise(limit: float, chosen: list[int]) -> None:
    found = SOLVERS["flips"](NOISE, GROUPS, COSTS, np.array([limit]))
    assert np.flatnonzero(found.choice).tolist() == chosen


def test_what_a_flip_saves_does_not_count() -> None:
    # The least noise is in a group of a byte, which is flipped in vain; the linear program leaves it alone.
    noise, costs = np.diag([1.0, 0.0, 2.0, 0.0, 3.0, 0.0]), np.array([[0.5, 1.0, 50.0, 100.0, 50.0, 100.0]])
    groups, limits = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5])], np.array([160.0])
    assert np.flatnonzero(SOLVERS["flips"](noise, groups, costs, limits).choice).tolist() == [0, 2, 5]
    assert np.flatnonzero(SOLVERS["linear"](noise, groups, costs, limits).choice).tolist() == [1, 2, 5]


def test_a_choice_that_does_not_help_is_left_out() -> None:
    # Noisier and larger: never taken.
    noise, costs = np.diag([1.0, 0.0, 2.0, 0.0]), np.array([[9.0, 4.0, 1.0, 4.0]])
    found = SOLVERS["flips"](noise, [np.array([0, 1]), np.array([2, 3])], costs, np.array([5.0]))
    assert np.flatnonzero(found.choice).tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["convex", "indefinite", "diagonal"])
def test_its_plans_are_feasible_and_its_bound_valid(kind: str) -> None:
    solved = 0
    for seed in range(12):
        instance = random_instance(seed, groups=5, rows=seed % 3, kind=kind, tightness=0.7)
        optimum = SOLVERS["exhaustive"](*instance.arguments)
        if optimum.status != "optimal":
            continue
        try:
            found = SOLVERS["flips"](*instance.arguments)
        except SolverError:
            continue
        assert_sound(instance, found, optimum)
        solved += 1
    assert solved > 5


def test_ends_beyond_the_limits_are_said_to_prove_nothing() -> None:
    # Each flip alone exceeds one limit by more than it saves of the other; the first two together keep both.
    costs = np.array([[0.0, -3.0, 0.0, 2.0, 0.0, -1.0, 1.5], [0.0, 2.0, 0.0, -3.0, 0.0, 1.5, -1.0]])
    groups, noise = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5, 6])], np.diag([0.0, 1, 0, 2, 0, 3, 4])
    arguments = (noise, groups, costs, np.array([-1.0, -1.0]))
    assert np.flatnonzero(SOLVERS["linear"](*arguments).choice).tolist() == [1, 3, 4]
    with pytest.raises(SolverError, match="solver 'linear'"):
        SOLVERS["flips"](*arguments)
