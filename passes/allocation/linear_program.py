"""Exact integer linear program, for scores without pair terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pulp
from numpy.typing import ArrayLike

from fxquant.core.errors import OptionError, SolverError
from fxquant.passes.allocation import cbc
from fxquant.passes.allocation.local_search import LocalSearch
from fxquant.passes.allocation.presolve import reduce
from fxquant.passes.allocation.solution import BoolArray, Clock, FloatArray, IndexArray, Problem, Solution, answer
from fxquant.passes.allocation.without_cbc import fallback_note, solve_by_branching

# Rows are brought to this size, so that CBC's absolute tolerance of 1e-7 means 1e-10 of a row.
ROW_SIZE = 1e3


def solve_linear(
    values: ArrayLike,
    groups: Sequence[ArrayLike],
    costs: ArrayLike,
    limits: ArrayLike,
    *,
    time_limit: float = 60.0,
    seed: int = 0,
    products: Mapping[int, ArrayLike] | None = None,
) -> Solution:
    """Minimise sum_i values_ii x_i over one-hot x with costs x <= limits, exactly, as one program for CBC.

    Falls back to branch and bound where CBC is missing or fails; a note of the solution says so.

    The multiple-choice knapsack of HAWQ-V3 (Yao et al., 2021, eq. 9) with any number of limits.

    Args:
        values: (n, n) diagonal matrix, any unit.
        groups, costs, limits, time_limit, products: as for `solve_iqp`.
        seed: of the fallback's search; CBC itself needs none.

    Raises:
        OptionError: unusable arrays, or pair terms between groups, which this solver would ignore.
        SolverError: the time ended before any plan was found.
    """
    clock = Clock(time_limit)
    problem = Problem.checked(values, groups, costs, limits, products)
    if np.count_nonzero(problem.values - np.diag(np.diag(problem.values))):
        raise OptionError("values has pair terms between groups; use solve_iqp, or pass their diagonal only")
    reduced = reduce(problem)
    if reduced is None:
        return answer(problem, None, np.inf, clock)
    notes: list[str] = []
    try:
        choice, bound = solve_diagonal(reduced.problem, np.diag(reduced.problem.values), clock)
    except cbc.FAILURES as error:
        notes.append(fallback_note(error))
        choice, bound = solve_by_branching(reduced.problem, seed, clock)
    if choice is None and bound == np.inf:
        return answer(problem, None, np.inf, clock, notes)
    if choice is None:
        raise SolverError(f"no plan found within {time_limit} s and none excluded; allow more time")
    return answer(problem, reduced.expand(choice), bound, clock, notes)


def solve_diagonal(problem: Problem, scores: FloatArray, clock: Clock) -> tuple[BoolArray | None, float]:
    """Best plan under `scores` (m,) and the limits of `problem`, with its proven bound (inf: infeasible).

    Raises:
        MissingDependencyError: there is no CBC program that runs.
        SolverError: CBC failed, or its answer is wrong.
    """
    model = cbc.Model()
    variables = add_choices(model, problem, scores)
    excluded: set[bytes] = set()
    while True:
        result = model.solve(clock.left)
        # Presolve's rounding and CBC's may differ at a limit, so an "infeasible" is doubted once.
        if result.status == "infeasible" and not excluded and _has_plan(problem):
            raise SolverError("CBC calls a program infeasible that has a plan")
        if result.status == "infeasible" or result.values is None:
            return None, result.bound
        choice = result.values[: len(variables)] > 0.5
        if choice.tobytes() in excluded or (np.bincount(problem.group_of[choice]) > 1).any() or not choice.any():
            raise SolverError(
                f"CBC's plan picks {int(choice.sum())} choices for {len(problem.groups)} layers, or one "
                "that was excluded"
            )
        excluded.add(choice.tobytes())
        if problem.feasible(choice):
            bound = result.bound
            # CBC's proof is exact up to its tolerance, which `cbc` took off the bound again.
            return choice, float(scores[choice].sum()) if result.status == "optimal" else bound
        # Over a limit by less than CBC can see but more than we allow: exclude this one plan, ask again.
        picked = [(variables[index], 1.0) for index in np.flatnonzero(choice)]
        model.add_constraint(picked, "<=", len(picked) - 1.0)


def _has_plan(problem: Problem) -> bool:
    """Whether a short search finds a plan."""
    search = LocalSearch(problem, 0, Clock(1.0))
    search.start()
    return search.choice is not None


def add_choices(model: cbc.Model, problem: Problem, scores: FloatArray) -> list[pulp.LpVariable]:
    """Add binary x with sum_{i in group} x_i = 1 and costs x <= limits, rows scaled for CBC.

    A row with products gets z_ij = x_i x_j for every two groups that they join, as `linearise` has it.
    """
    variables = [model.add_variable(f"x{index}", float(score), binary=True) for index, score in enumerate(scores)]
    for group in problem.groups:
        model.add_constraint([(variables[index], 1.0) for index in group], "==", 1.0)
    for number, (row, limit) in enumerate(zip(problem.costs, problem.limits, strict=True)):
        matrix = problem.products.get(number)
        if not row.any() and matrix is None:
            # Only fixed choices were charged here, and the remainder exists because they fit.
            continue
        scale = ROW_SIZE / max(float(np.abs(row).max()), 0.0 if matrix is None else float(matrix.max()))
        terms = [(variables[index], float(row[index] * scale)) for index in np.flatnonzero(row)]
        if matrix is not None:
            for first, second in interacting(problem.groups, matrix):
                together = add_pairs(model, variables, first, second, {}, f"z{number}")
                terms += [(z, 2 * float(matrix[i, j]) * scale) for (i, j), z in together.items() if matrix[i, j]]
        model.add_constraint(terms, "<=", float(limit * scale))
    return variables


def interacting(groups: Sequence[IndexArray], matrix: FloatArray) -> list[tuple[list[int], list[int]]]:
    """Return the pairs of groups between which a matrix has entries."""
    return [
        (first.tolist(), second.tolist())
        for first, second in combinations(groups, 2)
        if matrix[np.ix_(first, second)].any()
    ]


def add_pairs(
    model: cbc.Model,
    singles: Sequence[pulp.LpVariable],
    first: Sequence[int],
    second: Sequence[int],
    scores: Mapping[tuple[int, int], float],
    name: str,
) -> dict[tuple[int, int], pulp.LpVariable]:
    """Add y_ij = x_i x_j for i, j of two groups, each with its score: sum_j y_ij = x_i, sum_i y_ij = x_j."""
    pairs = {
        (i, j): model.add_variable(f"{name}{i}_{j}", scores.get((i, j), 0.0), binary=False)
        for i in first
        for j in second
    }
    for i in first:
        model.add_constraint([*((pairs[i, j], 1.0) for j in second), (singles[i], -1.0)], "==", 0.0)
    for j in second:
        model.add_constraint([*((pairs[i, j], 1.0) for i in first), (singles[j], -1.0)], "==", 0.0)
    return pairs
