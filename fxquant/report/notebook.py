"""The report as a snippet for notebooks, and as one line."""

from __future__ import annotations

from fxquant.core.host import card, line, printable, table
from fxquant.core.host import tiles as tiles_html
from fxquant.core.ir import Program
from fxquant.report.html import tiles
from fxquant.report.page_data import overview
from fxquant.report.text import bytes_text, count_text, loss_text, percent_text


def one_line(program: Program) -> str:
    """Return what a prompt shows: coverage, size, bits, held-out loss and how the plan came about."""
    data = overview(program)
    outcome, covered = data["outcome"], data["coverage"]
    parts = [
        f"{covered['quantized']} of {covered['layers']} layers quantized",
        f"{bytes_text(outcome['bytes'])} ({outcome['size_ratio']:.3g} of float)",
    ]
    if outcome["average_bits"] is not None:
        parts.append(f"{outcome['average_bits']:.4g} stored bits a weight")
    if outcome["measured_loss"] is not None:
        parts.append(f"measured loss {loss_text(outcome['measured_loss'])} {outcome['loss_unit']}")
    return printable(f"Result({', '.join(parts)}, {outcome['status']})")


def page(program: Program, held_out_images: int | None = None) -> str:
    """Return the headline numbers and the layer table as a snippet of HTML."""
    data = overview(program, held_out_images)
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
