"""Measured milliseconds in the report's comparison table, and the same for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fxquant.core.facts import Settings, Target
from fxquant.core.host import Speed
from fxquant.core.ir import Program
from fxquant.report.terminal import table_text
from fxquant.report.text import bytes_text, percent_text


def comparison(rows: Iterable[Mapping[str, Any]], speeds: Iterable[Speed]) -> list[dict[str, Any]]:
    """Return comparison rows with these times in them; rows that were not timed now lose the times they had."""
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        # Times of another run were taken under another load; side by side they would mislead.
        kept = {key: value for key, value in row.items() if key not in ("milliseconds", "low", "high")}
        merged[str(row["name"])] = kept
    for speed in speeds:
        merged.setdefault(speed.name, {"name": speed.name})
        merged[speed.name] |= {"milliseconds": speed.milliseconds, "low": speed.low, "high": speed.high}
    return list(merged.values())


def runtime_text(program: Program, threads: int | None = None) -> str:
    """Return what milliseconds were measured in, for the report."""
    settings = program[Settings]
    count = threads or settings.threads
    used = count or torch.get_num_threads()
    return f"{program[Target].name}, 1 image, {used} thread{'' if used == 1 else 's'}"


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the comparison as a table for the terminal, columns without values left out."""
    columns = {
        "accuracy": ("accuracy", percent_text),
        "bytes": ("file", bytes_text),
        "milliseconds": ("ms", lambda value: f"{value:.3g}"),
        "low": ("quartiles", None),
    }
    present = {key: column for key, column in columns.items() if any(key in row for row in rows)}
    cells = []
    for row in rows:
        line = [str(row["name"])]
        for key, (_, write) in present.items():
            if key not in row:
                line.append("–")
            elif write is None:
                line.append(f"{row['low']:.3g}–{row['high']:.3g}")
            else:
                line.append(write(row[key]))
        cells.append(line)
    return table_text(("model", *(title for title, _ in present.values())), cells)
