"""Names that mean harm in every text of the report: on the page they are text, on the terminal they are harmless."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from fxquant.core.host import printable
from fxquant.report import one_line, overview, page, render, summary
from fxquant.report import page_data as contents
from tests.report.test_html import COMPARISON, Page
from tests.small import small_result

HOSTILE = (
    "</title></svg></script><script>alert('x')</script>{{ 7*7 }}{% raw %}\" onload=\"x\" '&amp;\u202e\x1b[2J\x00[red]"
)


def planted(value: Any, fields: frozenset[str], field: str = "") -> Any:
    """Return the value with the hostile text behind every text in it, and in front of the keys of these fields."""
    if isinstance(value, dict):
        keys = {key: HOSTILE + key if field in fields else key for key in value}
        return {keys[key]: planted(inner, fields, key) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [planted(inner, fields, field) for inner in value]
    return value + HOSTILE if isinstance(value, str) and field not in FIXED else value


FREE = frozenset({"pins", "forbid", "notes", "versions", "kernels"})
"""Fields whose keys are names."""
FIXED = frozenset({"axis", "choices"})
"""Fields that no file or model can fill."""


def report() -> dict[str, Any]:
    measured = {"comparison": COMPARISON, "runtime": "onnxruntime", "data": "digits", "parity": {"a": "b"}}
    return small_result().report_data({**measured, "kernels": {"stem": "QLinearConv"}})


def test_every_text_of_the_page_is_text() -> None:
    plain, made = Page(render(report())), render(planted(copy.deepcopy(report()), FREE))
    found = Page(made)
    assert found.open == []
    assert "<script" not in made
    assert "49" not in re.findall(r"\{\{.*?\}\}", made)
    # No element and no attribute that the plain page has not.
    assert {(tag, *sorted(given)) for tag, given in found.tags} <= {(tag, *sorted(given)) for tag, given in plain.tags}
    assert "".join(found.text).count("alert('x')") > 50


def test_the_page_obeys_no_control_characters() -> None:
    made = render(planted(copy.deepcopy(report()), FREE))
    assert all(letter.isprintable() or letter in "\n\t" for letter in made)


def test_notebook_and_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    result, data = small_result(), planted(overview(small_result().program), FREE)
    for place in ("terminal", "notebook"):
        monkeypatch.setattr(f"fxquant.report.{place}.overview", lambda *_: copy.deepcopy(data))
    assert contents.overview is overview
    html = page(result.program)
    assert "<script" not in html
    assert html.isprintable()
    assert Page(html).open == []
    shown = summary(result.program)
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    # Markup of rich is not obeyed: it stays to be read.
    assert "[red]" in shown
    assert one_line(result.program) == printable(one_line(result.program))
