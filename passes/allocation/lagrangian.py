"""Prices on the limits: plans and valid bounds from one multiplier per row, group by group."""

from __future__ import annotations

import numpy as np

from fxquant.passes.allocation.solution import FloatArray, IndexArray, Problem

# Prices tried per limit: enough to visit each breakpoint of a few hundred choices closely.
PRICE_STEPS = 40


def _prices(problem: Problem, scores: FloatArray) -> FloatArray:
    """A geometric path of prices of each row alone and of all rows together, (prices, k)."""
    count = len(problem.costs)
    spread = np.ptp(scores) + 1e-300
    units = np.array([np.ptp(row) for row in problem.costs]) + 1e-300
    steps = np.concatenate([[0.0], np.geomspace(1e-7, 1e4, PRICE_STEPS)]) * spread
    directions = np.concatenate([np.eye(count), np.ones((1 if count > 1 else 0, count))])
    if not count:
        return np.zeros((1, 0))
    return np.unique((steps[:, None, None] * directions[None] / units).reshape(-1, count), axis=0)


def lagrangian_plans(problem: Problem, scores: FloatArray) -> list[IndexArray]:
    """Plans (groups,) minimising scores + price' costs group by group, for a path of prices, no repeats."""
    plans = {}
    for price in _prices(problem, scores):
        priced = scores + price @ problem.costs
        plan = np.array([group[priced[group].argmin()] for group in problem.groups], dtype=np.intp)
        plans[plan.tobytes()] = plan
    # Starting from the plans closest to the limits: those need the least repair and are the best starts.
    excess = [np.abs(_overrun(problem, plan)).sum() for plan in plans.values()]
    order = np.argsort(excess, kind="stable")[:4]
    candidates = list(plans.values())
    return [candidates[position] for position in order]


def _overrun(problem: Problem, plan: IndexArray) -> FloatArray:
    return np.asarray((problem.costs[:, plan].sum(axis=1) - problem.limits) / problem.slack_unit)


def lagrangian_bound(problem: Problem, scores: FloatArray) -> float:
    """max over a path of prices >= 0 of min_x scores x + price' (costs x - limits); valid for every price."""
    best = -np.inf
    for price in _prices(problem, scores):
        priced = scores + price @ problem.costs
        least = sum(float(priced[group].min()) for group in problem.groups)
        best = max(best, least - float(price @ problem.limits))
    margin = 1e-12 * float(np.abs(scores).sum())
    return best - margin
