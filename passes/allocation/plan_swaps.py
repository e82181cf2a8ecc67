"""Small changes of a plan, best first: one site to another choice, or two sites at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fxquant.passes.allocation.solution import LIMIT_TOLERANCE, BoolArray, FloatArray, IndexArray, Problem


def swaps(
    matrices: Sequence[FloatArray],
    groups: Sequence[IndexArray],
    costs: FloatArray,
    limits: FloatArray,
    choice: BoolArray,
) -> Iterator[BoolArray]:
    """Yield every plan one or two groups away that keeps the limits, in the order of the models' predictions.

    Each model ranks the plans by `x' values x`. First comes what some model ranks highest, of those what all of them
    rank highest on average: no model can hide what another one believes in.

    Args:
        matrices: (n, n) symmetric each, at least one; only the order of their predictions counts, not their units.
        groups: one index array per one-hot group.
        costs: (k, n), one row per limit.
        limits: (k,).
        choice: (n,) bool, the plan that is to be changed.

    Raises:
        OptionError: unusable arrays.
    """
    problems = [Problem.checked(values, groups, costs, limits) for values in matrices]
    problem = problems[0]
    plan = np.array([group[choice[group]][0] for group in problem.groups], dtype=np.intp)
    first, second = _moves(problem, plan)
    if not len(first):
        return
    ranks = np.array([_ranks(_change(each.values, each.group_of, plan, first, second)) for each in problems])
    for move in np.lexsort((ranks.mean(axis=0), ranks.min(axis=0))):
        yield _moved(problem, plan, choice, first[move], second[move])


def descent(
    values: FloatArray,
    groups: Sequence[IndexArray],
    costs: FloatArray,
    limits: FloatArray,
    choice: BoolArray,
    steps: int,
) -> Iterator[BoolArray]:
    """Yield the plan that the best swaps one after the other lead to, by `x' values x`; none where no swap lowers it.

    Args:
        values: (n, n) symmetric.
        groups, costs, limits, choice: as for `swaps`.
        steps: swaps at most, of one or two groups each.

    Raises:
        OptionError: unusable arrays.
    """
    problem, found = Problem.checked(values, groups, costs, limits), choice
    for _ in range(steps):
        plan = np.array([group[found[group]][0] for group in problem.groups], dtype=np.intp)
        first, second = _moves(problem, plan)
        change = _change(problem.values, problem.group_of, plan, first, second)
        if not len(change) or change.min() >= 0:
            break
        best = int(change.argmin())
        found = _moved(problem, plan, found, first[best], second[best])
    if found is not choice:
        yield found


def _moved(problem: Problem, plan: IndexArray, choice: BoolArray, first: int, second: int) -> BoolArray:
    changed = choice.copy()
    for index in (first, second):
        changed[plan[problem.group_of[index]]] = False
        changed[index] = True
    return changed


def _moves(problem: Problem, plan: IndexArray) -> tuple[IndexArray, IndexArray]:
    """Return the moves that keep the limits as two indices to choose, the same twice where one group changes."""
    count = len(problem.values)
    current = plan[problem.group_of]
    added = problem.costs - problem.costs[:, current]
    room = problem.limits + LIMIT_TOLERANCE * problem.slack_unit - problem.costs[:, plan].sum(axis=1)
    moving = current != np.arange(count)
    allowed = moving[:, None] & moving[None, :] & (problem.group_of[:, None] < problem.group_of[None, :])
    alone = moving.copy()
    for row, left in zip(added, room, strict=True):
        allowed &= row[:, None] + row[None, :] <= left
        alone &= row <= left
    first, second = np.nonzero(allowed | np.diag(alone))
    return first, second


def _change(
    values: FloatArray, group_of: IndexArray, plan: IndexArray, first: IndexArray, second: IndexArray
) -> FloatArray:
    """Return what each move adds to `x' values x`; entries between two choices of one group are zero."""
    current, diagonal = plan[group_of], np.diag(values)
    reach = values[:, plan].sum(axis=1)
    # `reach` of a current choice holds its own diagonal, and that of another choice of its group nothing.
    alone = diagonal + 2 * reach
    alone[plan] -= 2 * diagonal[plan]
    single = alone - alone[current]
    f, s = current[first], current[second]
    both = 2 * (values[first, second] - values[first, s] - values[f, second] + values[f, s])
    return np.asarray(np.where(first == second, single[first], single[first] + single[second] + both))


def _ranks(change: FloatArray) -> IndexArray:
    ranks = np.empty(len(change), dtype=np.intp)
    ranks[np.argsort(change, kind="stable")] = np.arange(len(change))
    return ranks
