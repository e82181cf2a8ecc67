"""Shrink a problem before any search: merge tied groups, drop impossible choices and idle limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxquant.passes.allocation.solution import LIMIT_TOLERANCE, BoolArray, FloatArray, IndexArray, Problem


@dataclass(frozen=True)
class Reduced:
    """A smaller problem of the same optimum, and the way back.

    Args:
        problem: the smaller problem, m variables; x' values x agrees with the full one on mapped plans.
        members: m index arrays; choosing variable i chooses all of members[i] in the full problem.
        full_count: n of the full problem.
    """

    problem: Problem
    members: tuple[IndexArray, ...]
    full_count: int

    def expand(self, choice: BoolArray) -> BoolArray:
        """The full plan, (n,) bool, of a plan (m,) bool of the smaller problem."""
        full = np.zeros(self.full_count, dtype=bool)
        for variable in np.flatnonzero(choice):
            full[self.members[variable]] = True
        return full


def reduce(problem: Problem) -> Reduced | None:
    """Merge groups that equality rows tie choice by choice, then drop what no feasible plan can hold.

    A tie is a pair of opposite rows, r x <= c and -r x <= -c, over exactly two groups in which every
    choice of one group agrees with at most one of the other; both groups then act as one.
    Returns None where this alone proves that no plan is feasible.
    """
    links = _tie_links(problem)
    merged, members = _merge(problem, links)
    allowed = _possible(merged)
    if allowed is None:
        return None
    return _select(merged, members, allowed, len(problem.values))


def _opposite_pairs(problem: Problem) -> list[tuple[int, int]]:
    """Pairs of rows that say r x <= c and -r x <= -c, that is r x = c."""
    pairs = []
    free = set(range(len(problem.costs))) - set(problem.products)
    for first in range(len(problem.costs)):
        for second in range(first + 1, len(problem.costs)):
            if first in free and second in free and _are_opposite(problem, first, second):
                pairs.append((first, second))
                free -= {first, second}
    return pairs


def _are_opposite(problem: Problem, first: int, second: int) -> bool:
    return problem.limits[first] == -problem.limits[second] and np.array_equal(
        problem.costs[first], -problem.costs[second]
    )


def _tie_links(problem: Problem) -> dict[tuple[int, int], BoolArray]:
    """For every pair of groups tied by equality rows: which (choice, choice) combinations agree."""
    links: dict[tuple[int, int], BoolArray] = {}
    for row, _ in _opposite_pairs(problem):
        touched = np.unique(problem.group_of[problem.costs[row] != 0])
        if len(touched) != 2:
            continue
        first, second = problem.groups[touched[0]], problem.groups[touched[1]]
        total = problem.costs[row][first][:, None] + problem.costs[row][second][None, :]
        agrees = np.abs(total - problem.limits[row]) <= LIMIT_TOLERANCE * problem.slack_unit[row]
        key = (int(touched[0]), int(touched[1]))
        links[key] = links[key] & agrees if key in links else agrees
    return {
        key: agrees for key, agrees in links.items() if agrees.sum(axis=0).max() <= 1 and agrees.sum(axis=1).max() <= 1
    }


def _merge(problem: Problem, links: dict[tuple[int, int], BoolArray]) -> tuple[Problem, list[IndexArray]]:
    """Rewrite the problem with one variable per set of choices that are always chosen together."""
    # Each bundle lists, for the groups merged so far, the choices that must be taken together.
    bundles: dict[int, list[list[int]]] = {
        number: [[int(choice)] for choice in group] for number, group in enumerate(problem.groups)
    }
    home = list(range(len(problem.groups)))
    for (first, second), agrees in links.items():
        left, right = home[first], home[second]
        rows = {int(choice): position for position, choice in enumerate(problem.groups[first])}
        columns = {int(choice): position for position, choice in enumerate(problem.groups[second])}

        def partner(bundle: list[int], positions: dict[int, int]) -> int:
            return next(positions[choice] for choice in bundle if choice in positions)

        if left == right:
            # Already merged through other ties: only bundles that agree here too are left.
            bundles[left] = [
                bundle for bundle in bundles[left] if agrees[partner(bundle, rows), partner(bundle, columns)]
            ]
            continue
        bundles[left] = [
            one + other
            for one in bundles[left]
            for other in bundles[right]
            if agrees[partner(one, rows), partner(other, columns)]
        ]
        del bundles[right]
        home = [left if place == right else place for place in home]
    members = [np.array(bundle, dtype=np.intp) for bundle_list in bundles.values() for bundle in bundle_list]
    if any(not bundle_list for bundle_list in bundles.values()):
        # Ties that contradict one another: keep the groups apart; the limits show the contradiction.
        return problem, [np.array([index], dtype=np.intp) for index in range(len(problem.values))]
    gather = np.zeros((len(problem.values), len(members)))
    for column, member in enumerate(members):
        gather[member, column] = 1.0
    groups, start = [], 0
    for bundle_list in bundles.values():
        groups.append(np.arange(start, start + len(bundle_list), dtype=np.intp))
        start += len(bundle_list)
    products = {row: gather.T @ matrix @ gather for row, matrix in problem.products.items()}
    values = gather.T @ problem.values @ gather
    reduced = Problem(values, tuple(groups), problem.costs @ gather, problem.limits, products)
    return reduced, members


def least_sums(costs: FloatArray, groups: tuple[IndexArray, ...]) -> FloatArray:
    """Smallest entry of each row in each group, (k, groups)."""
    return np.stack([costs[:, group].min(axis=1) for group in groups], axis=1)


def _possible(problem: Problem) -> BoolArray | None:
    """Which choices fit every limit with all other groups at their cheapest; None where a group has none left."""
    allowed = np.ones(len(problem.values), dtype=bool)
    room = LIMIT_TOLERANCE * problem.slack_unit
    # Dropping a choice can make its group dearer, and so exclude others: repeated until nothing changes.
    while True:
        open_costs = np.where(allowed, problem.costs, np.inf)
        least = least_sums(open_costs, problem.groups)
        needed = problem.costs + (least.sum(axis=1, keepdims=True) - least)[:, problem.group_of]
        fits = allowed & (needed <= (problem.limits + room)[:, None]).all(axis=0)
        if any(not fits[group].any() for group in problem.groups):
            return None
        if fits.sum() == allowed.sum():
            return allowed
        allowed = fits


def _select(problem: Problem, members: list[IndexArray], allowed: BoolArray, full_count: int) -> Reduced:
    """Keep the allowed choices and the limits that some plan can break; sort variables by group."""
    order, groups, start = [], [], 0
    for group in problem.groups:
        kept = group[allowed[group]]
        order.append(kept)
        groups.append(np.arange(start, start + len(kept), dtype=np.intp))
        start += len(kept)
    keep = np.concatenate(order)
    costs = problem.costs[:, keep]
    # A limit that even the costliest plan keeps never binds; one with products is kept, its sums are not bounded here.
    most = -least_sums(-costs, tuple(groups)).sum(axis=1)
    joint = np.isin(np.arange(len(most)), list(problem.products))
    binding = np.flatnonzero((most > problem.limits) | joint)
    square = np.ix_(keep, keep)
    products = {new: problem.products[old][square] for new, old in enumerate(binding.tolist()) if joint[old]}
    smaller = Problem(problem.values[square], tuple(groups), costs[binding], problem.limits[binding], products)
    return Reduced(smaller, tuple(members[index] for index in keep), full_count)
