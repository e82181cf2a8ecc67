"""Small pieces of HTML that notebooks show: escaped, self-contained, in the colours of the page around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

ROWS = 300
"""Rows of a table at most."""

# Ink and paper are the notebook's own, so that light and dark pages are served without asking which it is.
STYLE = (
    ".fxquant{font:13px/1.45 system-ui,sans-serif;color:inherit;background:transparent}"
    ".fxquant .tiles{display:flex;flex-wrap:wrap;gap:8px;margin:4px 0 8px}"
    ".fxquant .tile{border:1px solid rgba(128,128,128,.4);border-radius:8px;padding:5px 10px}"
    ".fxquant .tile b{display:block;font-size:16px;font-variant-numeric:tabular-nums}"
    ".fxquant .soft{opacity:.7}"
    ".fxquant .scroll{overflow:auto;max-height:420px}"
    ".fxquant table{border-collapse:collapse;font-variant-numeric:tabular-nums;color:inherit;background:transparent}"
    ".fxquant th,.fxquant td{padding:2px 10px 2px 0;text-align:right;border-bottom:1px solid rgba(128,128,128,.25)}"
    ".fxquant th:first-child,.fxquant td:first-child{text-align:left}"
)


def card(title: str, *parts: str) -> str:
    """Return a whole snippet.

    Args:
        title: text in front.
        parts: HTML, from `tiles`, `table` and `line`.
    """
    return f'<div class="fxquant"><style>{STYLE}</style><b>{text(title)}</b>{"".join(parts)}</div>'


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Return the headline numbers, each as label, value and note."""
    shown = "".join(
        f'<div class="tile"><span class="soft">{text(label)}</span><b>{text(value)}</b>'
        f'<span class="soft">{text(note)}</span></div>'
        for label, value, note in values
    )
    return f'<div class="tiles">{shown}</div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; what goes beyond `ROWS` rows is counted below it."""
    head = "".join(f"<th>{text(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows[:ROWS])
    more = line(f"and {len(rows) - ROWS} more") if len(rows) > ROWS else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}'


def line(words: str) -> str:
    """Return one line of soft text."""
    return f'<div class="soft">{text(words)}</div>'


def text(words: str) -> str:
    """Return a text that is only text: markup escaped, control characters replaced."""
    return escape(printable(words), quote=True)


def printable(words: str) -> str:
    """Return a text without control characters: names come from files, and a terminal would obey them."""
    return "".join(letter if letter.isprintable() else "?" for letter in words)
