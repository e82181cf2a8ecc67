"""What other budgets bring: every plan that was measured, against one cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fxquant.core.facts import (
    LIMIT_TABLES,
    BitAllocation,
    BudgetCurve,
    CostTables,
    Finalists,
    SensitivityMatrix,
    usage,
)
from fxquant.core.ir import Program, Sites
from fxquant.core.run import UNITS
from fxquant.report.layers import average_bits, finite, model_bytes


def frontier(program: Program) -> dict[str, Any]:
    """Return the measured plans: those of the curve of budgets, the finalists and the chosen one, each once.

    The cost is what was minimized, else the budget's first limit that has a table, else the size in bytes. All losses
    are of weights rounded as when plans were compared.

    Args:
        program: with plan, sensitivity and costs.
    """
    chosen = program[BitAllocation]
    tabled_limits = [name for name in chosen.limits if LIMIT_TABLES[name][0] in program[CostTables].tables]
    axis = chosen.minimized or next(iter(tabled_limits), "size_mb")
    curve = program[BudgetCurve].plans if BudgetCurve in program else {}
    # Uniform plans before equal ones that were solved for, whose names say less.
    curve = dict(sorted(curve.items(), key=lambda entry: entry[1].status != "uniform"))
    finalists = program[Finalists].plans if Finalists in program else {}
    known = {**curve, **{name: replace(p, measured_loss=chosen.finalists.get(name)) for name, p in finalists.items()}}
    own = chosen.measured_loss if chosen.compared_loss is None else chosen.compared_loss
    points: list[dict[str, Any]] = []
    # The chosen plan first, so that it is never hidden behind an equal one.
    for name, plan in {chosen.estimator: replace(chosen, measured_loss=own), **known}.items():
        tabled = all(plan.choices[site.name] in site.choices for site in program[Sites].sites)
        labels = [plan.choices[site.name].label for site in program[Sites].sites]
        # Layers put in float by hand are not in the cost tables, so such a plan has no place on the curve.
        if not tabled or plan.measured_loss is None or any(labels == point["choices"] for point in points):
            continue
        points.append(
            {
                "name": name,
                "chosen": plan.choices == chosen.choices,
                "uniform": name.startswith("uniform "),
                # Of the chosen plan it may have been measured: a file, a time.
                "used": plan.used.get(axis) or usage(plan.choices, {axis: 0.0}, program[CostTables])[axis],
                "bytes": model_bytes(program, plan.choices),
                "average_bits": average_bits(program, plan),
                "loss": finite(plan.measured_loss),
                "modelled_loss": program[SensitivityMatrix].predict(plan.choices),
                "choices": labels,
            }
        )
    found = [point for point in points if point["loss"] is not None]
    return {
        "axis": axis,
        "unit": UNITS.get(chosen.loss, program[SensitivityMatrix].unit),
        "estimator": program[SensitivityMatrix].estimator,
        "images": max((plan.images for plan in curve.values()), default=chosen.images),
        "fewest_images": min((plan.images for plan in curve.values()), default=chosen.images),
        "points": sorted(found, key=lambda point: float(point["used"])),
    }
