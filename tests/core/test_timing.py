from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest

from fxquant.core import timing
from fxquant.core.timing import time_interleaved


class Clock:
    """Time that passes only inside the callables under test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def task(self, seconds: Iterator[float]) -> None:
        self.now += next(seconds)


def test_the_median_in_milliseconds_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    slow, fast = itertools.repeat(0.5), itertools.repeat(0.25)
    assert time_interleaved([lambda: clock.task(slow), lambda: clock.task(fast)]) == [500.0, 250.0]


def test_warm_up_and_rare_pauses_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # Compilation on the first call, then a preemption in two of five rounds.
    seconds = iter([9.0, 0.01, 0.01, 3.0, 0.01, 3.0, 0.01])
    assert time_interleaved([lambda: clock.task(seconds)], rounds=5) == [pytest.approx(10.0)]


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(monkeypatch), list[str]()

    def run(name: str) -> None:
        order.append(name)
        clock.now += 1.0

    time_interleaved([lambda: run("a"), lambda: run("b")], rounds=3)
    assert order == ["a", "a", "b", "b", *"ababab"]


def test_quick_callables_are_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(monkeypatch), itertools.count()

    def run() -> None:
        next(calls)
        clock.now += timing.INNER_SECONDS / 8

    assert time_interleaved([run], rounds=2) == [pytest.approx(timing.INNER_SECONDS / 8 * 1e3)]
    assert next(calls) >= 2 + 2 * 7
