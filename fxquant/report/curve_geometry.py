"""Geometry of the measured plans: loss against a cost, as numbers and texts that the template draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fxquant.report.text import UNITS, bytes_text, limit_text, loss_text

WIDTH = 620.0
HEIGHT = 240.0
FLOOR = 0.5
"""Share of the smallest loss above 0 at which losses of 0 and below are drawn: a logarithm has no place for them."""


def curve(frontier: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plans' places, the line of the best plan that is known at each cost, and both axes.

    Losses and costs are drawn by their logarithms; a loss of 0 or below lies on the lowest line.
    """
    points = frontier["points"]
    lowest = FLOOR * min((point["loss"] for point in points if point["loss"] > 0.0), default=1.0)
    across = _Axis([point["used"] for point in points], WIDTH)
    up = _Axis([max(point["loss"], lowest) for point in points], HEIGHT)

    def placed(point: Mapping[str, Any]) -> dict[str, Any]:
        used = f"{frontier['axis']} {limit_text(frontier['axis'], point['used'])}, {bytes_text(point['bytes'])}"
        title = f"{point['name']}\n{used}\nmeasured loss {loss_text(point['loss'])} {frontier['unit']}"
        kind = "hot" if point["chosen"] else "bf" if point["uniform"] else "accent"
        place = {"x": across.at(point["used"]), "y": HEIGHT - up.at(max(point["loss"], lowest))}
        return {**place, "title": title, "kind": kind, "label": point["name"] if point["uniform"] else ""}

    drawn = [placed(point) for point in points]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "points": drawn,
        "line": _staircase(drawn),
        "across": [{"at": across.at(value), "label": f"{value:.3g}"} for value in across.ticks()],
        "up": [{"at": HEIGHT - up.at(value), "label": loss_text(value)} for value in up.ticks()],
        "label": UNITS[frontier["axis"]],
    }


def _staircase(points: Sequence[Mapping[str, Any]]) -> str:
    """Return the path along the points that no point to their left lies below: at each cost the best plan known."""
    steps: list[str] = []
    lowest = -math.inf
    for point in sorted(points, key=lambda point: (point["x"], -point["y"])):
        if point["y"] > lowest:
            lowest = point["y"]
            steps.append(f"{'H' if steps else 'M'}{point['x']:.1f}{'V' if steps else ' '}{point['y']:.1f}")
    return "".join(steps)


class _Axis:
    """A logarithmic axis over some values, a little wider than they are; all values and places are finite."""

    def __init__(self, values: Sequence[float], length: float) -> None:
        known = [value for value in values if value > 0.0] or [1.0]
        low, high = math.log10(min(known)), math.log10(max(known))
        margin = 0.08 * (high - low) or 0.1
        self.low, self.high, self.length = low - margin, high + margin, length

    def at(self, value: float) -> float:
        """Return the place of a value above 0, from the axis' start."""
        return (math.log10(value) - self.low) / (self.high - self.low) * self.length

    def ticks(self) -> list[float]:
        """Return round values within the axis: powers of ten, with digits between them where those are few."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        inside: list[float] = []
        for between in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
            values = [digit * 10.0**decade for decade in decades for digit in between]
            inside = [value for value in values if self.low <= math.log10(value) <= self.high]
            if len(inside) >= 3:
                break
        return inside[:: max(1, math.ceil(len(inside) / 9))]
