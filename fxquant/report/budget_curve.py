"""The best plan at other budgets: the integer program solved along one limit, from the same scores."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from fxquant.core.errors import InfeasibleBudgetError, SolverError
from fxquant.core.facts import (
    LIMIT_TABLES,
    BitAllocation,
    Budget,
    CostTables,
    SensitivityMatrix,
    Settings,
    Surrogates,
    reachable,
    unit_of,
    usage,
)
from fxquant.core.ir import Choice, Program, Sites
from fxquant.passes import AllocateBits, uniform_plans
from fxquant.report.layers import finite, model_bytes

POINTS = 13
"""Limits that are solved for, both ends of the reachable range among them."""
SECONDS = 6.0
"""For all of them, shared evenly: on the 56 layers of a ResNet-56 half a second leaves gaps of a few per cent."""


def frontier(program: Program, seconds: float = SECONDS) -> dict[str, Any]:
    """Return the predicted loss and size of the best plan at limits across the reachable range.

    The limit is the budget's first that has a cost table, the size in bytes if none has; the budget's other limits
    hold as asked. All losses, those of the chosen and of the uniform plans too, are predicted by the preferred matrix.

    Args:
        program: with plan, sensitivity and costs.
        seconds: for all limits together; after them no further one is solved for, and `left_out` says how many.
    """
    limit, costs, matrix = axis(program), program[CostTables], program[SensitivityMatrix]
    sites, plan = program[Sites], program[BitAllocation]
    unit = unit_of(limit, costs)
    low, high = (cost / unit for cost in reachable(costs[LIMIT_TABLES[limit][0]], sites))
    asked = np.unique(np.geomspace(low, high, POINTS)) if 0 < low < high else np.array([high])
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    late = 0
    for value in asked:
        if time.monotonic() > deadline:
            late += 1
            continue
        best = _solved(program, limit, float(value), seconds / len(asked))
        if best is not None:
            solved = {"limit": float(value), "status": best.status, "gap": finite(best.gap)}
            rows.append({**solved, **_point(program, limit, best.choices)})
    # Layers put in float by hand are not in the cost tables, so such a plan has no place on the curve.
    counts = all(plan.choices[site.name] in site.choices for site in sites.sites)
    return {
        "axis": limit,
        "unit": matrix.unit,
        "estimator": matrix.estimator,
        "points": rows,
        "chosen": _point(program, limit, plan.choices) if counts else None,
        "beside": [
            {"name": name, **_point(program, limit, choices)} for name, choices in uniform_plans(sites.sites).items()
        ],
        "left_out": late,
    }


def axis(program: Program) -> str:
    """Return the limit that the curve runs along."""
    minimized = program[BitAllocation].minimized
    return minimized or next(iter(_tabled_limits(program)), "size_mb")


def _tabled_limits(program: Program) -> dict[str, float]:
    """Return the limits of the budget that have a cost table."""
    tables = program[CostTables].tables
    return {name: value for name, value in program[BitAllocation].limits.items() if LIMIT_TABLES[name][0] in tables}


def _solved(program: Program, limit: str, value: float, seconds: float) -> BitAllocation | None:
    settings, matrix = program[Settings], program[SensitivityMatrix]
    # The ends are reached exactly; rounding must not put them out of reach.
    budget = Budget.of(_tabled_limits(program) | {limit: value * (1 + 1e-9)})
    step = AllocateBits(
        budget, settings.solver, min(settings.time_limit, seconds), settings.seed, settings.requantization_cost
    )
    try:
        return step.run(program.with_facts(Surrogates({matrix.estimator: matrix})))[0][BitAllocation]
    except (InfeasibleBudgetError, SolverError):
        # Another limit of the budget is out of reach here, or the solver found nothing in its second.
        return None


def _point(program: Program, limit: str, choices: Mapping[str, Choice]) -> dict[str, float]:
    return {
        "used": usage(choices, {limit: 0.0}, program[CostTables])[limit],
        "loss": program[SensitivityMatrix].predict(choices),
        "bytes": model_bytes(program, choices),
    }
