"""Flips in order of noise, as AIMET's mixed precision walks its Pareto curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from fxquant.core.errors import SolverError
from fxquant.passes.allocation.lagrangian import lagrangian_bound
from fxquant.passes.allocation.presolve import reduce
from fxquant.passes.allocation.solution import LIMIT_TOLERANCE, Clock, IndexArray, Problem, Solution, answer


def solve_flips(
    values: ArrayLike,
    groups: Sequence[ArrayLike],
    costs: ArrayLike,
    limits: ArrayLike,
    *,
    time_limit: float = 60.0,
    seed: int = 0,
    products: Mapping[int, ArrayLike] | None = None,
) -> Solution:
    """Start at every group's choice of least value, and flip choices in order of value until the limits hold.

    One list holds the choices of all groups, the least value first; each flips its group if that lowers what the limits
    are exceeded by (Pandey et al., arXiv 2302.05397; phase 2 of AIMET's mixed precision). How much a choice saves does
    not count, so plans are worse than those of `solve_linear`. Only the diagonal of `values` is read. The bound is the
    Lagrangian's for a diagonal matrix, -inf with pair terms.

    Args:
        values, groups, costs, limits, time_limit, seed, products: as for `solve_iqp`; nothing is random.

    Raises:
        OptionError: unusable arrays.
        SolverError: the last flip still exceeds a limit; that is no proof that there is no plan.
    """
    del seed
    clock = Clock(time_limit)
    problem = Problem.checked(values, groups, costs, limits, products)
    reduced = reduce(problem)
    if reduced is None:
        return answer(problem, None, np.inf, clock)
    small = reduced.problem
    noise = np.diag(small.values)
    plan = np.array([group[noise[group].argmin()] for group in small.groups], dtype=np.intp)
    excess = _excess(small, plan)
    for index in np.argsort(noise, kind="stable"):
        if excess == 0:
            break
        flipped = plan.copy()
        flipped[small.group_of[index]] = index
        after = _excess(small, flipped)
        if after < excess:
            plan, excess = flipped, after
    if excess > 0:
        raise SolverError("flips end at a plan beyond the limits; use solver 'linear', which proves if there is one")
    choice = np.zeros(len(noise), dtype=bool)
    choice[plan] = True
    has_pairs = np.count_nonzero(small.values - np.diag(noise)) > 0
    bound = -np.inf if has_pairs else lagrangian_bound(small, noise)
    return answer(problem, reduced.expand(choice), min(bound, small.objective(choice)), clock)


def _excess(problem: Problem, plan: IndexArray) -> float:
    """Return the sum over limits of what a plan exceeds them by, each in its own unit; 0 where all hold."""
    over = (problem.row_sums(plan) - problem.limits) / problem.slack_unit
    return float(np.where(over > LIMIT_TOLERANCE, over, 0.0).sum())
