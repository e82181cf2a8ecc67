"""A result in a notebook and in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxquant.core.host import card, line, printable, table
from fxquant.core.host import tiles as tiles_html
from fxquant.report.html import tiles
from fxquant.report.page_data import overview
from fxquant.report.text import bytes_text, count_text, loss_text, percent_text

if TYPE_CHECKING:
    from fxquant.result import Result


def one_line(result: Result) -> str:
    """Return what a prompt shows: coverage, size, bits, held-out loss and how the plan came about."""
    data = overview(result)
    outcome, covered = data["outcome"], data["coverage"]
    told = [
        f"{covered['quantized']} of {covered['layers']} layers quantized",
        f"{bytes_text(outcome['bytes'])} ({outcome['size_ratio']:.3g} of float)",
    ]
    if outcome["average_bits"] is not None:
        told.append(f"{outcome['average_bits']:.4g} bits a weight")
    if outcome["measured_loss"] is not None:
        told.append(f"held-out loss {loss_text(outcome['measured_loss'])} {outcome['loss_unit']}")
    return printable(f"Result({', '.join(told)}, {outcome['status']})")


def page(result: Result) -> str:
    """Return the headline numbers and the layer table as a snippet of HTML."""
    data = overview(result)
    rows = [
        (
            row["name"],
            row["kind"],
            row["choice"],
            count_text(row["weights"]),
            bytes_text(row["bytes"]),
            percent_text(row["share_of_bytes"]),
            loss_text(row["loss"]),
        )
        for row in data["layers"]
    ]
    return card(
        "fxquant result",
        tiles_html((tile["label"], tile["value"], tile["note"]) for tile in tiles(data)),
        line(data["coverage"]["sentence"]),
        table(("layer", "kind", "precision", "weights", "bytes", "share", "loss alone"), rows),
    )
