"""The curve of budgets: plans solved at limits across the reachable range, each measured on held-out images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fxquant.core.errors import InfeasibleBudgetError, SolverError
from fxquant.core.facts import (
    LIMIT_TABLES,
    BitAllocation,
    Budget,
    BudgetCurve,
    CostTables,
    SensitivityMatrix,
    Settings,
    Surrogates,
    reachable,
    unit_of,
)
from fxquant.core.host import SILENT, Reporter
from fxquant.core.ir import Program, Sites
from fxquant.core.run import CalibrationSet
from fxquant.flow.score import loss_in_use
from fxquant.passes import AllocateBits, Meter, uniform_plans

SECONDS = 6.0
"""For all solves together, shared evenly: on 56 layers half a second leaves gaps of a few per cent."""


def measure_curve(
    program: Program,
    budget: Budget | None,
    held_out: CalibrationSet,
    reporter: Reporter = SILENT,
    meter: Meter | None = None,
) -> BudgetCurve:
    """Return the best plans of the preferred estimator at limits across the range, and the uniform plans, measured.

    Limits are spaced evenly by their logarithm, both ends among them. They are those of the cost that is minimized, of
    the budget's first limit, or of the size in bytes; the budget's other limits hold as asked.

    Args:
        program: with sensitivity and costs, and no rounding of one plan.
        budget: the limits; None for none.
        held_out: images that plans are compared on.
        reporter: shows progress.
        meter: of the program on these images, which knows some plans; None makes one.
    """
    settings = program[Settings]
    if not settings.curve:
        return BudgetCurve({})
    meter = meter or Meter(program, held_out, loss_in_use(program, held_out))
    plans = _solved(program, budget, settings.curve)
    known = program[BitAllocation] if BitAllocation in program else next(iter(plans.values()))
    plans |= {
        name: BitAllocation(choices, estimator=name, status="uniform")
        for name, choices in uniform_plans(program[Sites].sites).items()
    }
    measured: dict[str, BitAllocation] = {}
    for name, plan in reporter.track(plans.items(), "measure other budgets", len(plans)):
        loss, images = meter.rough(plan, known)
        measured[name] = replace(plan, measured_loss=loss, loss=meter.loss.name, images=images)
    return BudgetCurve(measured)


def _solved(program: Program, budget: Budget | None, points: int) -> dict[str, BitAllocation]:
    """Return the plan of each limit by name; limits that cannot be kept with the others have none."""
    settings, costs, matrix = program[Settings], program[CostTables], program[SensitivityMatrix]
    limits = {} if budget is None else budget.limits
    minimized = budget.minimize if budget is not None and budget.quality else ""
    axis = minimized or next(iter(limits), "size_mb")
    low, high = (end / unit_of(axis, costs) for end in reachable(costs[LIMIT_TABLES[axis][0]], program[Sites]))
    asked = np.unique(np.geomspace(low, high, points)) if 0 < low < high else np.array([high])
    alone = program.with_facts(Surrogates({matrix.estimator: matrix}))
    seconds = min(settings.time_limit, SECONDS / len(asked))
    found: dict[str, BitAllocation] = {}
    for value in asked.tolist():
        # The ends are reached exactly; rounding must not put them out of reach.
        within = Budget.of({**limits, axis: value * (1 + 1e-9)})
        step = AllocateBits(within, settings.solver, seconds, settings.seed, settings.requantization_cost)
        try:
            plan = step(alone)[BitAllocation]
        except (InfeasibleBudgetError, SolverError):
            # Another limit of the budget is out of reach here, or the solver found nothing in its time.
            continue
        if all(plan.choices != known.choices for known in found.values()):
            found[f"{axis} {value:.4g}"] = plan
    return found
