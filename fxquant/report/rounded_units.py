"""Outcome of the weight rounding, unit by unit, as plain values."""

from __future__ import annotations

from typing import Any

from fxquant.core.facts import BitAllocation, Rounding
from fxquant.core.ir import Program
from fxquant.report.layers import finite

WHOLE = "whole network"
"""Name of the unit of an algorithm that is judged as a whole."""


def rounding(program: Program) -> dict[str, Any]:
    """Return the method, the outcome of each unit, and one sentence on both.

    Losses are on held-out images: of the network quantized up to the end of the unit and float after it, or of the
    whole network quantized.
    """
    known = Rounding.of(program, program[BitAllocation].choices)
    # Closed-form algorithms are judged as a whole and name no sites.
    units = [unit for unit in known.units if unit.sites]
    kept = sum(unit.kept for unit in units)
    sentence = f"Weights rounded by {known.method}"
    if units:
        sentence += f", {kept} of {len(units)} units kept"
        undone = len(units) - kept
        sentence += f"; {undone} stayed as they were because nothing better was found" if undone else ""
    return {
        "method": known.method,
        "sentence": sentence,
        "notes": list(known.notes),
        "units": [
            {
                "name": unit.name if unit.sites else WHOLE,
                "sites": list(unit.sites),
                "method": unit.method,
                "before": finite(unit.before),
                "after": finite(unit.after),
                "kept": unit.kept,
                "reason": unit.reason,
                "seconds": unit.seconds,
            }
            for unit in known.units
        ],
    }
