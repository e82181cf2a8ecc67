from __future__ import annotations

from benchmarks.recipes_page import PAGE, filled
from fxquant.recipes import RECIPES


def test_the_page_holds_what_the_tables_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text) == text, "run python -m benchmarks.recipes_page"
    assert all(f"\n| `{name}` |" in text for name in RECIPES)
