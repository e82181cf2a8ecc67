"""MixQuant's rule: of each group the cheapest choice whose error is within a factor k of the widest choice's error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from fxquant.core.errors import OptionError, SolverError
from fxquant.passes.allocation.lagrangian import lagrangian_bound
from fxquant.passes.allocation.linear_program import solve_linear
from fxquant.passes.allocation.solution import BoolArray, Clock, FloatArray, Problem, Solution, answer


def solve_threshold(
    values: ArrayLike,
    groups: Sequence[ArrayLike],
    costs: ArrayLike,
    limits: ArrayLike,
    *,
    time_limit: float = 60.0,
    seed: int = 0,
    products: Mapping[int, ArrayLike] | None = None,
) -> Solution:
    """Minimise k such that choices with `values_ii <= k values_ref` keep costs x <= limits, and take the cheapest.

    values_ref is the least error above 0 in the group, that of 8 bits where they are among its choices. The rule is
    MixQuant's (Kloberdanz & Le, arXiv 2309.17341), whose user gives k; here bisection over the ratios finds the least k
    that meets the limits. With k given, one limit and no ties, the cheapest choice is the smallest width. A note of the
    solution says which k it is.

    The sum of errors is not minimised: the plan is "feasible", its bound the Lagrangian's.

    Args:
        values: (n, n) diagonal matrix of errors, at least 0, any unit.
        groups, costs, limits, time_limit, products: as for `solve_iqp`.
        seed: unused but where CBC fails.

    Raises:
        OptionError: unusable arrays, pair terms between groups, or errors below 0.
        SolverError: the time ended before any plan was found.
    """
    clock = Clock(time_limit)
    problem = Problem.checked(values, groups, costs, limits, products)
    ratios = error_ratios(problem)
    steps = np.unique(ratios)
    # steps[: low] are known to be too strict, steps[high] to be enough.
    low, high = 0, len(steps) - 1
    best = cheapest_within(problem, ratios, float(steps[-1]), clock, seed)
    if best is None:
        return answer(problem, None, np.inf, clock)
    while low < high:
        middle = (low + high) // 2
        found = cheapest_within(problem, ratios, float(steps[middle]), clock, seed)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    note = f"threshold: every layer's error is within k = {steps[high]:.4g} of that of its widest choice"
    bound = min(lagrangian_bound(problem, np.diag(problem.values)), problem.objective(best))
    return answer(problem, best, bound, clock, (note,))


def error_ratios(problem: Problem) -> FloatArray:
    """Return every choice's error over the least error above 0 of its group, shape (n,); 0 for no error.

    Raises:
        OptionError: pair terms between groups, or errors below 0.
    """
    errors = np.diag(problem.values)
    if np.count_nonzero(problem.values - np.diag(errors)):
        raise OptionError("values has pair terms between groups; use solve_iqp, or pass their diagonal only")
    if (errors < 0).any():
        raise OptionError(f"a threshold needs errors of at least 0, got {errors.min()}; use solve_linear")
    ratios = np.zeros(len(errors))
    for group in problem.groups:
        above = errors[group][errors[group] > 0]
        if len(above):
            ratios[group] = errors[group] / above.min()
    return ratios


def cheapest_within(problem: Problem, ratios: FloatArray, k: float, clock: Clock, seed: int = 0) -> BoolArray | None:
    """Return the cheapest plan within the limits of choices with ratio <= k, shape (n,), or None without any.

    Cheapest is the least sum of the limits' rows, each over its largest possible sum. Rows that join one or two of
    more groups are ties, and are kept but cost nothing.

    Raises:
        SolverError: the time ended before any plan was found.
    """
    allowed = [group[ratios[group] <= k] for group in problem.groups]
    if any(len(group) == 0 for group in allowed):
        return None
    kept = np.sort(np.concatenate(allowed))
    joined = np.array([[row[group].any() for group in problem.groups] for row in problem.costs], dtype=bool)
    spans = joined.sum(axis=1) if len(problem.costs) else np.zeros(0)
    budgets = spans > min(2, len(problem.groups) - 1)
    weight = np.where(budgets if budgets.any() else True, 1.0, 0.0) / problem.slack_unit
    if not clock.left:
        raise SolverError(f"no threshold found within {clock.allowed} s; allow more time")
    found = solve_linear(
        np.diag((weight @ problem.costs)[kept]),
        [np.searchsorted(kept, group) for group in allowed],
        problem.costs[:, kept],
        problem.limits,
        time_limit=clock.left,
        seed=seed,
        products={row: matrix[np.ix_(kept, kept)] for row, matrix in problem.products.items()},
    )
    if found.status == "infeasible":
        return None
    choice = np.zeros(len(ratios), dtype=bool)
    choice[kept[found.choice]] = True
    return choice
