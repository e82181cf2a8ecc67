"""Nearest rounding: every weight to the closest value of its grid, the rung all others are compared with."""

from __future__ import annotations

from fxquant.core.facts import Rounding
from fxquant.core.ir import Program
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask


@ROUNDERS.register("nearest")
def nearest(task: RoundingTask) -> Program:
    """Forget what earlier algorithms chose: `q = clamp(round(w / scale), qmin, qmax)`."""
    # Parameters that took the place of the model's own are in the graph, and would be missed by who reads a file.
    return task.program.with_facts(Rounding(task.choices, "nearest", parameters=task.rounding.parameters))
