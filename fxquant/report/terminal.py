"""The report for the terminal: a few lines and a table, plain text of fixed width."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxquant.core.host import int8_instructions, printable
from fxquant.core.ir import Program
from fxquant.report.page_data import overview
from fxquant.report.text import bound_text, bytes_text, count_text, latency_text, limit_text, loss_text, percent_text

COLUMNS = 100
COLUMN_GAP = 3


def summary(program: Program) -> str:
    """Return the plan as text of at most 100 columns, without colour codes."""
    data = overview(program)
    lines = [*_headline(data), data["coverage"]["sentence"], data["rounding"]["sentence"]]
    if data["sensitive"] is not None:
        share, option = percent_text(data["sensitive"]["share"]), data["sensitive"]["option"]
        lines.append(f"{share} of what layers lose alone at their widest integers is saved by {option}")
    if int8_instructions() == "":
        lines.append("This processor has no int8 products: integers may be no faster than float; run fxquant bench")
    return "\n\n".join([as_text(*map(Text, map(printable, lines))), _layers(data), _plans(data)])


def as_text(*parts: Text | Table) -> str:
    """Return what rich would print on a plain terminal of 100 columns."""
    stream = io.StringIO()
    console = Console(file=stream, width=COLUMNS, no_color=True, force_terminal=False, highlight=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def table_text(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a plain table.

    Args:
        columns: headings.
        rows: cells as text, one sequence for each row.
        left: how many columns from the left are texts; the others are numbers, set flush right.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position < left else "right", no_wrap=True, overflow="fold")
    lines = [[printable(cell) for cell in row] for row in rows]
    # Only names may be cut: a number that is cut is a wrong number.
    others = [max(map(len, column)) for column in zip(columns[1:], *(line[1:] for line in lines), strict=True)]
    room = max(12, COLUMNS - sum(others) - COLUMN_GAP * len(others))
    for line in lines:
        table.add_row(*map(Text, (_shortened(line[0], room), *line[1:])))
    return as_text(table)


def _shortened(name: str, room: int) -> str:
    """Return the end of a long name, which tells layers apart better than its beginning."""
    return name if len(name) <= room else f"…{name[1 - room :]}"


def _headline(data: Mapping[str, Any]) -> list[str]:
    outcome = data["outcome"]
    size = f"{bytes_text(outcome['bytes'])}, {outcome['size_ratio']:.3g} of the float model's"
    bits = outcome["average_bits"]
    lines = [
        f"Size {size} {bytes_text(outcome['float_bytes'])}" + (f"; {bits:.4g} stored bits a weight" if bits else "")
    ]
    if data["recipe"] is not None:
        about = f": {data['recipe']['about']} ({data['recipe']['source']})" if "about" in data["recipe"] else ""
        lines.append(f"Recipe {data['recipe']['name']}{about}")
    for limit in outcome["limits"]:
        name, used = limit["name"], limit_text(limit["name"], limit["used"])
        allowed = limit_text(name, limit["limit"])
        if limit["limit"] is None:
            lines.append(f"Minimized {name}: {used}")
        elif limit.get("bound") is not None:
            sure = bound_text(limit, outcome["confidence"])
            lines.append(f"Budget {name} {limit['limit']:.4g}: measured {limit['used']:.4g}, {sure}")
        elif limit["used"] is None:
            lines.append(f"Budget {name}: {allowed}, which this plan makes no claim on")
        else:
            lines.append(f"Budget {name}: {limit['used']:.4g} of {allowed} used")
    if outcome["latency"] is not None:
        lines.append(latency_text(outcome["latency"]))
    if outcome["measured_loss"] is not None:
        line = f"Measured loss {loss_text(outcome['measured_loss'])} {outcome['loss_unit']}"
        before = outcome["compared_loss"]
        lines.append(line if before is None else f"{line}; {loss_text(before)} before the last rounding, as below")
    gap = "" if outcome["gap"] is None else f", gap {percent_text(outcome['gap'])}"
    lines.append(f"Plan by {outcome['estimator']}, {outcome['status']}{gap}: {outcome['status_text']}")
    return lines + [f"Note: {note}" for note in outcome["notes"]]


def _layers(data: Mapping[str, Any]) -> str:
    rows = [
        (
            row["name"],
            row["kind"],
            row["choice"],
            count_text(row["weights"]),
            count_text(row["macs"]),
            bytes_text(row["bytes"]),
            percent_text(row["share_of_bytes"]),
            loss_text(row["loss"]),
        )
        for row in data["layers"]
    ]
    return table_text(("layer", "kind", "choice", "weights", "MACs", "bytes", "share", "loss alone"), rows, left=3)


def _plans(data: Mapping[str, Any]) -> str:
    rows = [
        (
            ("* " if row["chosen"] else "  ") + row["name"],
            loss_text(row["measured_loss"]) if row["fits"] else "over budget",
            loss_text(row["modelled_loss"]),
            bytes_text(row["bytes"]),
            "–" if row["average_bits"] is None else f"{row['average_bits']:.4g}",
        )
        for row in data["plans"]
    ]
    modelled = f"modelled by {data['sensitivity']['estimator']}"
    return table_text(("plan (* chosen)", "measured loss", modelled, "bytes", "stored bits"), rows)
