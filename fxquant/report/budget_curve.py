"""What other budgets would have brought: the integer program solved again along one limit, from the same scores."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from fxquant.core.errors import InfeasibleBudgetError, SolverError
from fxquant.core.facts import LIMIT_TABLES, BitAllocation, Budget, Settings, Surrogates, reachable, unit_of, usage
from fxquant.core.ir import Sites
from fxquant.passes import AllocateBits, uniform_plans
from fxquant.report.layers import finite, model_bytes

if TYPE_CHECKING:
    from fxquant.result import Result

POINTS = 13
"""Limits that are solved for, both ends of the reachable range among them."""
SECONDS = 6.0
"""For all of them, shared evenly: on the 56 layers of a ResNet-56 half a second leaves gaps of a few per cent."""


def frontier(result: Result, seconds: float = SECONDS) -> dict[str, Any]:
    """Return the predicted loss and size of the best plan at limits across the reachable range.

    The limit is the budget's first that has a cost table, the size in bytes where there is none; the budget's other
    limits hold as asked. Losses are those of the preferred matrix, predicted and not measured; the chosen plan and the
    uniform plans stand beside the curve by the same matrix.

    Args:
        result: with sensitivity and costs.
        seconds: for all limits together; after them no further one is solved for, and `left_out` says how many.
    """
    limit = axis(result)
    table, unit = _table(result, limit), unit_of(limit, result.costs)
    low, high = (cost / unit for cost in reachable(table, result.program[Sites]))
    asked = np.unique(np.geomspace(low, high, POINTS)) if 0 < low < high else np.array([high])
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    late = 0
    for value in asked:
        if time.monotonic() > deadline:
            late += 1
            continue
        plan = _solved(result, limit, float(value), seconds / len(asked))
        if plan is not None:
            solved = {"limit": float(value), "status": plan.status, "gap": finite(plan.gap)}
            rows.append({**solved, **_point(result, limit, plan.choices)})
    beside = {name: _point(result, limit, plan) for name, plan in _uniform(result).items()}
    return {
        "axis": limit,
        "unit": result.sensitivity.unit,
        "estimator": result.sensitivity.estimator,
        "points": rows,
        "chosen": _point(result, limit, result.allocation.choices) if _counts(result) else None,
        "beside": [{"name": name, **point} for name, point in beside.items()],
        "left_out": late,
    }


def axis(result: Result) -> str:
    """Return the limit that the curve runs along."""
    known = [name for name in result.allocation.limits if LIMIT_TABLES[name][0] in result.costs.tables]
    return known[0] if known else "size_mb"


def _table(result: Result, limit: str) -> Any:
    return result.costs[LIMIT_TABLES[limit][0]]


def _counts(result: Result) -> bool:
    """Whether the plan is made of candidates: layers put in float by hand have no place in the tables."""
    return all(result.allocation.choices[site.name] in site.choices for site in result.program[Sites].sites)


def _uniform(result: Result) -> dict[str, Any]:
    return uniform_plans(result.program[Sites].sites)


def _solved(result: Result, limit: str, value: float, seconds: float) -> BitAllocation | None:
    settings, matrix = result.program[Settings], result.sensitivity
    others = {n: v for n, v in result.allocation.limits.items() if LIMIT_TABLES[n][0] in result.costs.tables}
    # The ends are reached exactly; rounding must not put them out of reach.
    budget = Budget.of(others | {limit: value * (1 + 1e-9)})
    step = AllocateBits(
        budget,
        settings.solver,
        min(settings.time_limit, seconds),
        settings.seed,
        settings.requantization_cost,
    )
    program = result.program.with_facts(Surrogates({matrix.estimator: matrix}))
    try:
        return step.run(program)[0][BitAllocation]
    except (InfeasibleBudgetError, SolverError):
        # Another limit of the budget is out of reach here, or the solver found nothing in its second.
        return None


def _point(result: Result, limit: str, choices: Any) -> dict[str, float]:
    return {
        "used": usage(choices, {limit: 0.0}, result.costs)[limit],
        "loss": result.sensitivity.predict(choices),
        "bytes": model_bytes(result, choices),
    }
