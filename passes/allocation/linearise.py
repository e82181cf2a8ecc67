"""The integer quadratic program as one linear program in PuLP, solved by CBC: exact for small remainders."""

from __future__ import annotations

import numpy as np

from fxquant.passes.allocation import cbc
from fxquant.passes.allocation.linear_program import add_choices, add_pairs, interacting
from fxquant.passes.allocation.solution import BoolArray, Clock, Problem


def pair_count(problem: Problem) -> int:
    """How many pair variables the linear model needs: pairs of choices of two groups that interact."""
    return sum(len(first) * len(second) for first, second in interacting(problem.groups, problem.values))


def solve_linearised(problem: Problem, clock: Clock) -> tuple[BoolArray | None, float]:
    """Minimise x' values x over the plans of `problem` with CBC; the plan, (n,) bool, and a proven bound.

    x_i x_j becomes a variable y_ij >= 0 with sum_{j in h} y_ij = x_i for both groups of the pair, which
    is exact for one-hot x (Adams and Sherali, 1986: level one of the reformulation-linearization
    technique). No plan and bound inf means infeasible; no plan and a lower bound means out of time.
    """
    count = len(problem.values)
    model = cbc.Model()
    singles = add_choices(model, problem, np.diag(problem.values))
    for first, second in interacting(problem.groups, problem.values):
        scores = {(i, j): 2 * float(problem.values[i, j]) for i in first for j in second}
        add_pairs(model, singles, first, second, scores, "y")
    result = model.solve(clock.left)
    if result.values is None:
        return None, result.bound
    choice = result.values[:count] > 0.5
    # A plan over a limit by less than CBC's tolerance is no plan of ours; its bound stays valid.
    return (choice if problem.feasible(choice) else None), result.bound
