"""Geometry of the page's pictures: plain numbers and texts that the template draws as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fxquant.core.ir import FLOAT_BITS, Choice
from fxquant.report.text import bytes_text, count_text, loss_text, percent_text

BAR_HEIGHT = 150
LARGEST_INTEGER = 8
FULL_MATRIX = 96
"""Candidates up to which the whole matrix is drawn; above, one row a layer at its chosen precision."""
MOST_ROWS = 160
"""Layers drawn at most; above, those whose entries are largest."""
SMALLEST_COLOUR = 2
"""Fewest bits that the page has a colour for."""
MATRIX_SIDE = 640.0
SMALLEST_CELL = 4.0


def bars(layers: list[dict[str, Any]], choices: Sequence[str] | None = None) -> dict[str, Any]:
    """Return one bar a layer: height by weight bits, a tick at its activation bits, details to hover.

    Args:
        layers: rows of the chosen plan.
        choices: label of each layer's precision in another plan; None for the chosen one.
    """
    if choices is not None:
        layers = [_as_in(row, label) for row, label in zip(layers, choices, strict=True)]
    step = max(14.0, min(64.0, 920.0 / max(1, len(layers))))
    drawn = [_bar(row, position * step, step) for position, row in enumerate(layers)]
    lines = [{"y": BAR_HEIGHT - bits / LARGEST_INTEGER * BAR_HEIGHT, "label": str(bits)} for bits in (2, 4, 6, 8)]
    shown = sorted({row["weight_bits"] for row in layers})
    legend = [{"class": _class(bits), "label": "float" if bits == FLOAT_BITS else f"{bits:g} bits"} for bits in shown]
    labels = step >= 14.0 and len(layers) <= 64
    longest = max((len(_short(row["name"])) for row in layers), default=0)
    return {
        "bars": drawn,
        "lines": lines,
        "legend": legend,
        "labels": labels,
        "width": step * len(layers),
        "height": BAR_HEIGHT,
        "below": 12.0 + 5.2 * longest if labels else 8.0,
    }


def _as_in(row: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return a layer's row with another precision, without what only its own precision costs and loses."""
    choice = Choice.parse(label)
    other = {"choice": label, "weight_bits": choice.weight_bits, "activation_bits": choice.activation_bits}
    return {key: row[key] for key in ("name", "kind", "weights")} | other


def _class(bits: float) -> str:
    return "bf" if bits == FLOAT_BITS else f"b{max(SMALLEST_COLOUR, int(bits))}"


def _short(name: str) -> str:
    """Return the end of a long name, which tells layers apart better than its beginning."""
    return name if len(name) <= 22 else f"…{name[-21:]}"


def _bar(row: Mapping[str, Any], x: float, step: float) -> dict[str, Any]:
    bits = min(row["weight_bits"], LARGEST_INTEGER)
    height = bits / LARGEST_INTEGER * BAR_HEIGHT
    activation = min(row["activation_bits"], LARGEST_INTEGER) / LARGEST_INTEGER * BAR_HEIGHT
    title = f"{row['name']} ({row['kind']}): {row['choice']}\n{count_text(row['weights'])} weights"
    if "bytes" in row:
        share = percent_text(row["share_of_bytes"])
        title += f", {bytes_text(row['bytes'])} ({share}), {count_text(row['macs'])} MACs"
        title += f"\nloss alone {loss_text(row['loss'])}"
    return {
        "x": x + 0.12 * step,
        "middle": x + 0.5 * step,
        "y": BAR_HEIGHT - height,
        "width": 0.76 * step,
        "height": height,
        "tick": BAR_HEIGHT - activation,
        "class": _class(row["weight_bits"]),
        "label": _short(row["name"]),
        "title": title,
    }


def heat_map(sensitivity: Mapping[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the matrix as cells: red where losses add, blue where they cancel, strength by the fourth root of size.

    Sizes span many orders of magnitude; on a linear scale all but a handful of cells would be blank.
    """
    names = [(c["site"], c["choice"]) for c in sensitivity["candidates"]]
    values = sensitivity["values"]
    shown = list(range(len(names)))
    note = ""
    if len(names) > FULL_MATRIX:
        chosen = {(row["name"], row["choice"]) for row in layers}
        shown = [k for k in shown if names[k] in chosen]
        note = "One row and column for each layer, at the precision the plan gives it."
    if len(shown) > MOST_ROWS:
        weight = {k: sum(abs(values[k][other]) for other in shown) for k in shown}
        shown = sorted(sorted(shown, key=lambda k: -weight[k])[:MOST_ROWS])
        note += f" Only the {MOST_ROWS} layers with the largest entries are drawn."
    largest = max((abs(values[i][j]) for i in shown for j in shown), default=0.0)
    cell = max(SMALLEST_CELL, MATRIX_SIDE / max(1, len(shown)))
    cells = [
        _cell(names[i], names[j], values[i][j], largest, column * cell, line * cell, i == j)
        for line, i in enumerate(shown)
        for column, j in enumerate(shown)
        if values[i][j] != 0.0
    ]
    owners = [names[k][0] for k in shown]
    return {
        "cells": cells,
        "side": cell * len(shown),
        "cell": cell,
        "borders": [first * cell for _, first, _ in _groups(owners)][1:] if len(shown) <= FULL_MATRIX else [],
        "labels": _labels(owners, cell),
        "largest": loss_text(largest),
        "unit": sensitivity["unit"],
        "note": note.strip(),
    }


def _cell(
    row: tuple[str, str], column: tuple[str, str], value: float, largest: float, x: float, y: float, own: bool
) -> dict[str, Any]:
    strength = (abs(value) / largest) ** 0.25 if largest else 0.0
    title = f"{row[0]} {row[1]} alone: {loss_text(value)}"
    if not own:
        title = f"{row[0]} {row[1]} × {column[0]} {column[1]}: {loss_text(value)}"
    return {"x": x, "y": y, "class": "hot" if value > 0 else "cold", "strength": f"{strength:.2f}", "title": title}


def _groups(names: list[str]) -> list[tuple[str, int, int]]:
    """Return (name, first, count) of each run of equal names."""
    groups: list[tuple[str, int, int]] = []
    for position, name in enumerate(names):
        if groups and groups[-1][0] == name:
            groups[-1] = (name, groups[-1][1], groups[-1][2] + 1)
        else:
            groups.append((name, position, 1))
    return groups


def _labels(names: list[str], cell: float) -> list[dict[str, Any]]:
    """Return a label for each layer whose rows are high enough to be read."""
    groups = _groups(names)
    return [
        {"middle": (first + count / 2) * cell, "label": _short(name)}
        for name, first, count in groups
        if count * cell >= 11.0
    ]
