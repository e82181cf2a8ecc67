from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.core.errors import OptionError
from fxquant.core.facts import matcher

NAME = "stages.2.blocks.11.attn.qkv_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.attn\..*",
        r"stages\.[0-3]\.blocks\.\d+\.attn\.(q|k|v|qkv)_proj",
        r"(stages|layers)\..*qkv.*",
        r"(?:stages\.2\.)+blocks.{1,40}",
        r"[\w.]+proj",
        r"[^]]*proj[s]?",
        r"(?i)STAGES.*?",
        r"stages\.2\.blocks\.\d{1,2}\..*",
        r"stages{1}\.2.*|head",
    ],
)
def test_what_people_write(pattern: str) -> None:
    assert matcher(pattern)(NAME)
    assert not matcher(pattern)("stem")


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(a+)+$", "repeats what repeats"),
        ("(a|a)*b", "alternatives"),
        ("(?:a*){2,}", "repeats what repeats"),
        ("((a{1,30})){1,30}b", "repeats what repeats"),
        ("(a?){30}a{30}", "repeats what repeats"),
        (r"(a*)\1b", "refers to a group"),
        ("(?P<x>a*)(?P=x)b", "refers to a group"),
        ("(", "not a regular expression"),
        ("a{99999999999999999999}", "not a regular expression"),
        ("(" * 5000, "not a regular expression"),
    ],
)
def test_what_could_take_for_ever(pattern: str, why: str) -> None:
    with pytest.raises(OptionError, match=why):
        matcher(pattern)


def test_a_long_name_bounds_the_repeats() -> None:
    pattern = ".*" * 6 + "x"
    assert matcher(pattern)("box")
    with pytest.raises(OptionError, match="repeats too much for a name of 60 letters"):
        matcher(pattern)("b" * 60)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@given(st.text("ab|()*+?{}1,2[]^\\.", max_size=12), st.text("ab", max_size=14))
@settings(max_examples=200, deadline=None)
def test_the_same_answer_as_pythons_or_a_refusal(pattern: str, word: str) -> None:
    try:
        known = re.compile(pattern)
    except (re.error, OverflowError):
        known = None
    try:
        answer = matcher(pattern)(word)
    except OptionError:
        return
    assert known is not None
    assert answer == (known.fullmatch(word) is not None)
