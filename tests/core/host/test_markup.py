from __future__ import annotations

import re

import pytest

from fxquant.core.host import ROWS, STYLE, card, line, table, text, tiles

HOSTILE = "</td></table><script>alert('x')</script>\"onload=\"\x1b[2J\u202e&amp;"


@pytest.mark.parametrize(
    "made",
    [
        card(HOSTILE),
        tiles([(HOSTILE, HOSTILE, HOSTILE)]),
        table((HOSTILE,), [(HOSTILE,)]),
        line(HOSTILE),
        text(HOSTILE),
    ],
    ids=["card", "tiles", "table", "line", "text"],
)
def test_hostile_texts_are_text(made: str) -> None:
    assert "<script" not in made
    assert '"onload' not in made
    assert "&amp;amp;" in made
    assert made.isprintable()


def test_a_snippet_needs_nothing_and_takes_the_colours_around_it() -> None:
    made = card("plan", tiles([("bits", "4", "average")]), table(("layer", "bits"), [("stem", "4")]), line("done"))
    assert not re.search(r"https?://|url\(|@import|src=|<script|<link", made)
    assert "color:inherit" in STYLE
    assert "#" not in STYLE
    # Rules hold inside the snippet alone.
    rules = [part for part in STYLE.split("}") if part]
    assert all(name.startswith(".fxquant") for rule in rules for name in rule.split("{")[0].split(","))
    for tag in ("div", "table", "thead", "tbody", "tr", "th", "td", "b", "span", "style"):
        assert len(re.findall(rf"<{tag}[ >]", made)) == made.count(f"</{tag}>")


def test_a_long_table_is_cut_and_says_so() -> None:
    rows = [(f"layer {k}",) for k in range(ROWS + 2)]
    made = table(("layer",), rows)
    assert made.count("<td>") == ROWS
    assert "and 2 more" in made
    assert "more" not in table(("layer",), rows[:ROWS])
