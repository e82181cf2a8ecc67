from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.passes.allocation import trust_region

Plan = tuple[int, ...]
IMAGES = 8


def measured(target: Plan, plan: Plan) -> Tensor:
    """A loss with its minimum at the target, hard to model from far away: it saturates."""
    distance = sum(abs(a - b) for a, b in zip(target, plan, strict=True))
    return torch.full((IMAGES,), float(1 - np.exp(-distance / 3.0)))


def zeros(count: int) -> Plan:
    return (0,) * count


def better(now: Tensor, then: Tensor) -> bool:
    return bool(then.mean() < now.mean())


def test_walks_to_a_better_plan_in_steps_of_the_radius() -> None:
    target, scored = (1,) * 6, []

    def score(plan: Plan) -> Plan:
        scored.append(plan)
        return plan

    def solve(model: Plan, plan: Plan, radius: int) -> Plan:
        assert model == plan
        wrong = [k for k in range(6) if plan[k] != target[k]][:radius]
        return tuple(target[k] if k in wrong else plan[k] for k in range(6))

    best, steps = trust_region(zeros(6), score, solve, lambda p: measured(target, p), better, rounds=3, radius=1)
    assert [(s.round, s.radius, sum(s.plan), s.accepted) for s in steps] == [
        (1, 1, 1, True),
        (2, 2, 3, True),
        (3, 4, 6, True),
    ]
    assert best == target
    assert scored == [(0,) * 6, steps[0].plan, steps[1].plan]


@pytest.mark.parametrize(("size", "tries"), [(8, [8, 4, 2]), (2, [2, 1])])
def test_shrinks_where_the_model_lies_and_stops_when_nothing_helps(size: int, tries: list[int]) -> None:
    tried = []

    def solve(model: Plan, plan: Plan, radius: int) -> Plan:
        assert model == plan
        tried.append(radius)
        return (1,) * radius + (0,) * (size - radius)

    start = zeros(size)
    best, steps = trust_region(start, lambda p: p, solve, lambda p: measured(start, p), better, 3, radius=size)
    assert (best, tried, len(steps)) == (start, tries, len(tries))
    assert not any(s.accepted for s in steps)


def test_a_plan_that_stays_ends_the_search() -> None:
    for answer in ((0,), None):

        def solve(model: Plan, plan: Plan, radius: int, answer: Plan | None = answer) -> Plan | None:
            assert (model, plan, radius) == ((0,), (0,), 1)
            return answer

        best, steps = trust_region(
            zeros(1), lambda p: p, solve, lambda p: measured((1,), p), better, rounds=3, radius=1
        )
        assert (best, steps) == ((0,), [])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 4), st.integers(1, 4), st.integers(0, 9))
def test_never_worse_than_the_start(target: list[int], rounds: int, radius: int, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def solve(model: Plan, plan: Plan, near: int) -> Plan:
        assert model == plan
        moved = list(plan)
        for k in rng.choice(len(plan), size=min(near, len(plan)), replace=False):
            moved[k] = int(rng.integers(0, 4))
        return tuple(moved)

    start = tuple(0 for _ in target)
    best, steps = trust_region(start, lambda p: p, solve, lambda p: measured(tuple(target), p), better, rounds, radius)
    assert measured(tuple(target), best).mean() <= measured(tuple(target), start).mean()
    assert len(steps) <= 3 * rounds


def test_later_steps_are_compared_with_the_plan_in_hand() -> None:
    # The third plan is better than the start and worse than the second.
    losses = {0: 1.0, 1: 0.2, 2: 0.5}
    best, steps = trust_region(
        (0,), lambda p: p, lambda _, p, __: (p[0] + 1,), lambda p: torch.full((IMAGES,), losses[p[0]]), better, 2, 1
    )
    assert best == (1,)
    assert [step.accepted for step in steps] == [True, False, False]
