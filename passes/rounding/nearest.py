"""Nearest rounding: every weight to the closest value of its grid, the baseline of all other algorithms."""

from __future__ import annotations

from fxquant.core.facts import Rounding
from fxquant.core.ir import Program
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask


@ROUNDERS.register("nearest")
def nearest(task: RoundingTask) -> Program:
    """Discard the choices of earlier algorithms: `q = clamp(round(w / scale), qmin, qmax)`."""
    # Equalized parameters are in the graph already, and a file of the rounding must hold them.
    return task.program.with_facts(Rounding(task.choices, "nearest", parameters=task.rounding.parameters))
