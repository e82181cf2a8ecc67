"""What rounding the weights better than to nearest came to, unit by unit, as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxquant.core.facts import Rounding
from fxquant.report.layers import finite

if TYPE_CHECKING:
    from fxquant.result import Result

WHOLE = "whole network"
"""In the place of a unit's name where an algorithm is judged as a whole."""


def rounding(result: Result) -> dict[str, Any]:
    """Return the method in place, what became of each unit, and one sentence on both.

    Losses are of held-out images: of the network quantized up to the end of the unit and float behind it, or of the
    whole network quantized.
    """
    known = Rounding.of(result.program, result.allocation.choices)
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
