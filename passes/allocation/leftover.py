"""What a limit leaves over: widen a plan, site by site, while every limit keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fxquant.passes.allocation.solution import LIMIT_TOLERANCE, BoolArray, FloatArray, IndexArray, Problem


def fill(
    diagonal: FloatArray,
    groups: Sequence[IndexArray],
    costs: FloatArray,
    limits: FloatArray,
    ties: FloatArray,
    sides: FloatArray,
    widths: FloatArray,
    choice: BoolArray,
    products: Mapping[int, FloatArray] | None = None,
) -> BoolArray:
    """Widen a plan greedily and return it; the same plan where nothing fits.

    Each step moves one group to a choice that is wider, costs no less in any row, keeps all rows and has a smaller
    diagonal term; of those the one with the largest fall per cost `max over rows of what it adds`. Every step lowers
    `sum of diagonal over the chosen` and raises a width, so the steps end (the greedy of multiple-choice knapsacks).

    Args:
        diagonal: (n,) loss of each substitution alone.
        groups: one index array per one-hot group.
        costs: (k, n), one row per limit, scaled to a limit of about 1.
        limits: (k,).
        ties: (t, n), rows that must hold and are no cost.
        sides: (t,), their right sides.
        widths: (n, w); a choice is wider than another if none of its widths is smaller and one is larger.
        choice: (n,) bool, a plan that keeps all rows.
        products: row of `costs` -> (n, n), what two choices cost together there, at least 0.

    Raises:
        OptionError: unusable arrays.
    """
    rows, bounds = np.concatenate([costs, ties]), np.concatenate([limits, sides])
    problem = Problem.checked(np.diag(diagonal), groups, rows, bounds, products)
    room = problem.limits + LIMIT_TOLERANCE * problem.slack_unit
    plan = choice.copy()
    while True:
        picked = np.array([group[plan[group]][0] for group in problem.groups], dtype=np.intp)
        current, added = picked[problem.group_of], problem.row_changes(picked)
        keeps = (problem.row_sums(picked)[:, None] + added <= room[:, None]).all(axis=0)
        grown = widths - widths[current]
        wider = (grown >= 0).all(axis=1) & (grown > 0).any(axis=1)
        falls = diagonal[current] - diagonal
        fit = keeps & wider & (added[: len(costs)] >= 0).all(axis=0) & (falls > 0)
        if not fit.any():
            return plan
        # What costs nothing comes first, the largest fall of them before the others.
        price = np.maximum(added[: len(costs)].max(axis=0, initial=0.0), 1e-12)
        best = int(np.where(fit, falls / price, -np.inf).argmax())
        plan[current[best]] = False
        plan[best] = True
