from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from fxquant.core.errors import OptionError
from fxquant.core.facts import Options, literals, options_of, rules
from fxquant.core.ir import Choice


@dataclass(frozen=True)
class Trip(Options):
    """A journey.

    Args:
        days: how long it takes; at least
            one.
        pace: how fast.
        stops: where it stops.
        size: two numbers.
        rooms: stop -> precision.
        notes: stop -> anything.
        paid: whether it is paid.
        folder: where it is kept.
        here: not saved.

    Raises:
        OptionError: a value that is not allowed.
    """

    days: int | None = field(default=None, metadata=rules(least=1))
    pace: Literal["slow", "fast"] = "slow"
    stops: tuple[str, ...] = ()
    size: tuple[float, float] = field(default=(1.0, 2.0), metadata=rules(above=0, below=9))
    rooms: Mapping[str, Choice] = field(default_factory=dict, metadata=rules(flag="room"))
    notes: Mapping[str, object] = field(default_factory=dict)
    paid: bool = False
    folder: Path = Path("here")
    here: bool = field(default=False, metadata=rules(saved=False))


FULL = Trip(3, "fast", ("a", "b"), (2, 3), {"a": Choice(4, 8)}, {"b": (1, "x"), "c": None}, True, Path("x"), True)


def test_what_is_known_of_a_field() -> None:
    days, rooms = options_of(Trip)["days"], options_of(Trip)["rooms"]
    assert days.help == "how long it takes; at least one."
    assert (days.least, days.flag, rooms.flag, rooms.default) == (1, "days", "room", {})
    assert literals(options_of(Trip)["pace"].kind) == ("slow", "fast")
    assert [name for name, option in options_of(Trip).items() if not option.help] == []


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("days", np.int64(4), 4),
        ("days", None, None),
        ("stops", ["a", "b"], ("a", "b")),
        ("stops", "a", ("a",)),
        ("size", [1, 2], (1.0, 2.0)),
        ("rooms", {"a": "W4A8", "b": "float"}, {"a": Choice(4, 8), "b": Choice(32, 32)}),
        ("notes", {"a": [1, 2.5], "b": True}, {"a": (1, 2.5), "b": True}),
    ],
)
def test_values_are_brought_to_the_type_of_the_field(name: str, value: object, read: object) -> None:
    assert getattr(Trip.of({name: value}), name) == read
    assert type(getattr(Trip.of({name: value}), name)) is type(read)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("days", 0, "days=0 must be a whole number of at least 1"),
        ("days", True, "days=True must be a whole number"),
        ("days", "3", "days='3' must be a whole number"),
        ("pace", "fats", r"unknown pace 'fats' \(did you mean 'fast'\?\); known: slow, fast"),
        ("pace", 1, "pace=1 must be one of 'slow', 'fast'"),
        ("stops", [1], r"stops=\[1\] must be a list of texts"),
        ("size", (1.0,), r"size=\(1.0,\) must be 2 finite numbers above 0 and below 9"),
        ("size", (1.0, float("inf")), "must be 2 finite numbers"),
        ("size", (1, 9), "below 9"),
        ("rooms", {"a": "W2A"}, "precision 'W2A' is not understood"),
        ("rooms", {"a": 8}, "must be a mapping"),
        ("rooms", 3, "must be a mapping"),
        ("notes", {"a": [[1]]}, "must be a mapping"),
        ("notes", {1: "a"}, "must be a mapping"),
        ("paid", 1, "must be True or False"),
        ("day", 1, r"unknown option 'day' \(did you mean 'days'\?\)"),
    ],
)
def test_values_that_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Trip.of({name: value})


def test_json_holds_all_that_is_saved() -> None:
    read = Trip.of(json.loads(json.dumps(FULL.to_json())) | {"folder": Path("x")})
    assert read == Trip.of(FULL, here=False)
    assert "here" not in FULL.to_json()


def test_options_by_name_replace_those_of_an_object() -> None:
    changed = Trip.of(FULL, days=9, pace=None)
    assert (changed.days, changed.pace, changed.stops) == (9, "fast", FULL.stops)
    with pytest.raises(FrozenInstanceError):
        setattr(changed, next(iter(options_of(Trip))), 1)
