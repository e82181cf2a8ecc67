"""What rounding the weights better than to nearest came to, unit by unit, as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxquant.core.rounding import Rounding
from fxquant.report.layers import finite

if TYPE_CHECKING:
    from fxquant.result import Result


def rounding(result: Result) -> dict[str, Any]:
    """Return the method in place, what became of each unit, and one sentence on both.

    Losses are of held-out images, of the network quantized up to the end of the unit and float behind it.
    """
    known = Rounding.of(result.program, result.allocation.choices)
    kept = sum(unit.kept for unit in known.units)
    sentence = f"Weights rounded by {known.method}"
    if known.units:
        sentence += f", {kept} of {len(known.units)} units kept"
        undone = len(known.units) - kept
        sentence += f"; {undone} stayed at nearest rounding because nothing better was found" if undone else ""
    return {
        "method": known.method,
        "sentence": sentence,
        "notes": list(known.notes),
        "units": [
            {
                "name": unit.name,
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
