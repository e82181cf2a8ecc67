"""Lagrangian plans without a solver: the fallback, and the first starts of the local search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from fxquant.core.errors import SolverError
from fxquant.passes.allocation.lagrangian import lagrangian_bound
from fxquant.passes.allocation.local_search import LocalSearch
from fxquant.passes.allocation.presolve import reduce
from fxquant.passes.allocation.solution import Clock, Problem, Solution, answer


def solve_greedy(
    values: ArrayLike,
    groups: Sequence[ArrayLike],
    costs: ArrayLike,
    limits: ArrayLike,
    *,
    time_limit: float = 60.0,
    seed: int = 0,
    products: Mapping[int, ArrayLike] | None = None,
) -> Solution:
    """Approximately minimise x' values x over one-hot x with costs x <= limits, in numpy alone.

    Minimises sum_i (values_ii + price' costs_i) x_i group by group for a path of prices (Everett, 1963),
    repairs and improves each plan by exchanges of one and two groups, and keeps the best. For a diagonal
    matrix the bound is the Lagrangian's, max_price min_x values x + price' (costs x - limits); with pair
    terms it is -inf.

    Args:
        values, groups, costs, limits, time_limit, seed, products: as for `solve_iqp`.

    Raises:
        OptionError: unusable arrays.
        SolverError: no feasible plan was found; that is no proof that there is none.
    """
    clock = Clock(time_limit)
    problem = Problem.checked(values, groups, costs, limits, products)
    reduced = reduce(problem)
    if reduced is None:
        return answer(problem, None, np.inf, clock)
    search = LocalSearch(reduced.problem, seed, clock)
    search.start()
    if search.choice is None:
        search.kick()
    if search.choice is None:
        raise SolverError("the greedy solver met no plan within the limits; use solve_iqp, which can prove it")
    diagonal = np.diag(reduced.problem.values)
    has_pairs = np.count_nonzero(reduced.problem.values - np.diag(diagonal)) > 0
    bound = -np.inf if has_pairs else lagrangian_bound(reduced.problem, diagonal)
    return answer(problem, reduced.expand(search.choice), min(bound, search.best_objective), clock)
