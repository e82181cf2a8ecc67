from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.recipes_page import PAGES, filled, made
from fxquant.core.errors import FileFormatError
from fxquant.recipes import RECIPES

TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
PAGE = Path("page.md")


def test_the_pages_hold_what_the_tables_say() -> None:
    assert filled(TEXTS, made()) == TEXTS, "run python -m benchmarks.recipes_page"
    assert all(f"\n| `{name}` |" in TEXTS[PAGES[0]] for name in RECIPES)


def test_each_mark_stands_once_and_has_a_table() -> None:
    marks = Counter(
        re.findall(r"^<!-- ((?:end of )?(?:recipes|figures of [^>]*?)) -->$", "\n".join(TEXTS.values()), re.M)
    )
    assert set(marks.values()) == {1}
    assert set(marks) == {*made(), *(f"end of {name}" for name in made())}


@pytest.mark.parametrize(
    "text",
    [
        "no mark",
        "<!-- a -->\nold",
        "<!-- a -->\nold\n<!-- end of a -->\n" * 2,
        "<!-- end of a -->\n<!-- a -->\n",
    ],
)
def test_a_table_without_its_place_is_not_put_at_the_end(text: str) -> None:
    with pytest.raises(FileFormatError, match="the marks of 'a' must stand in one page once"):
        filled({PAGE: text}, {"a": "new"})


def test_only_what_is_between_the_marks_changes() -> None:
    text = "above\n<!-- a -->\nold\n<!-- end of a -->\nbelow\n"
    assert filled({PAGE: text}, {"a": "new"}) == {PAGE: "above\n<!-- a -->\n\nnew\n\n<!-- end of a -->\nbelow\n"}
