"""Every plan tried: the oracle for tests and the last step of the search on tiny remainders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from fxquant.core.errors import OptionError
from fxquant.passes.allocation.solution import (
    LIMIT_TOLERANCE,
    BoolArray,
    Clock,
    FloatArray,
    IndexArray,
    Problem,
    Solution,
    answer,
)

# Plans looked at in one go: bounds memory at about chunk x groups x 8 bytes.
CHUNK = 1 << 14


def solve_exhaustive(
    values: ArrayLike,
    groups: Sequence[ArrayLike],
    costs: ArrayLike,
    limits: ArrayLike,
    *,
    time_limit: float = 60.0,
    seed: int = 0,
    products: Mapping[int, ArrayLike] | None = None,
) -> Solution:
    """Minimise x' values x over one-hot x with costs x <= limits by trying every plan.

    Args:
        values, groups, costs, limits, products: as for `solve_iqp`.
        time_limit: wall-clock seconds; when they end, the best plan so far without a bound.
        seed: unused, kept for the common signature.

    Raises:
        OptionError: unusable arrays, or the time ended before any feasible plan was met.
    """
    del seed
    clock = Clock(time_limit)
    problem = Problem.checked(values, groups, costs, limits, products)
    choice, complete = best_plan(problem, problem.limits + LIMIT_TOLERANCE * problem.slack_unit, clock)
    if choice is None and not complete:
        raise OptionError(f"{count_plans(problem)} plans are too many to try in {time_limit} s; use solve_iqp")
    if choice is None:
        return answer(problem, None, np.inf, clock)
    return answer(problem, choice, problem.objective(choice) if complete else -np.inf, clock)


def count_plans(problem: Problem) -> int:
    """Number of one-hot plans, limits aside."""
    return math.prod(len(group) for group in problem.groups)


def best_plan(problem: Problem, room: FloatArray, clock: Clock) -> tuple[BoolArray | None, bool]:
    """The best plan with costs x <= room, (k,), (None: there is none), and whether all plans were tried."""
    total = count_plans(problem)
    best, best_objective = None, np.inf
    for start in range(0, total, CHUNK):
        if start and not clock.left:
            return best, False
        plans = _plans(problem.groups, start, min(start + CHUNK, total))
        used = np.array(sum(problem.costs[:, plans[:, group]] for group in range(plans.shape[1])))
        for row, matrix in problem.products.items():
            for group in range(plans.shape[1]):
                used[row] += matrix[plans[:, group][:, None], plans].sum(axis=1)
        plans = plans[(used <= room[:, None]).all(axis=0)] if len(problem.costs) else plans
        if not len(plans):
            continue
        objectives = np.zeros(len(plans))
        for group in range(plans.shape[1]):
            objectives += problem.values[plans[:, group][:, None], plans].sum(axis=1)
        winner = int(objectives.argmin())
        if objectives[winner] < best_objective:
            best, best_objective = np.zeros(len(problem.values), dtype=bool), float(objectives[winner])
            best[plans[winner]] = True
    return best, True


def _plans(groups: tuple[IndexArray, ...], start: int, stop: int) -> IndexArray:
    """Plans number start..stop-1 in mixed-radix order, (plans, groups) of chosen indices."""
    numbers = np.arange(start, stop)
    columns = []
    for group in groups:
        numbers, digit = np.divmod(numbers, len(group))
        columns.append(group[digit])
    return np.stack(columns, axis=1)
