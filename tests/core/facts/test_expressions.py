from __future__ import annotations

import re

import pytest

from fxquant.core.errors import OptionError
from fxquant.core.facts import expressions, matched

NAME = "stages.2.blocks.11.attn.qkv_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        r"stages\.[0-3]\.blocks\.\d+\.attn\.(q|k|v|qkv)_proj",
        r"(?:stages\.2\.)+blocks.{1,40}",
        r"[^]]*proj[s]?",
        r"(?i)STAGES.*?",
        r"(stages)?.*\1.*|head",
        r"((\w+)\.)+attn\..*",
    ],
)
def test_whole_names_are_matched(pattern: str) -> None:
    names = [NAME, "stem", f"{NAME}]\n", "ä.🙂"]
    assert matched(pattern, names) == [name for name in names if re.fullmatch(pattern, name)]


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "(" * 5000])
def test_what_is_no_regular_expression(pattern: str) -> None:
    with pytest.raises(OptionError, match="not a regular expression"):
        matched(pattern, ["a"])


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(?:a*){2,}b", "((a{1,30})){1,30}b", r"(a*)*\1b", ".*" * 40 + "b"]
)
def test_what_would_take_years_is_ended(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.3)
    with pytest.raises(OptionError, match=r"takes longer than 0.3 s to match 1 names; write it with fewer"):
        matched(pattern, ["a" * 200])


def test_a_pattern_is_matched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matched("st.*", ["stem", "head"]) == ["stem"]
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert matched("st.*", ["stem", "head"]) == ["stem"]
    with pytest.raises(OptionError, match="could not be matched"):
        matched("st.*", ["stem"])
