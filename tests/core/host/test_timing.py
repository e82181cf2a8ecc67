from __future__ import annotations

import itertools
import random
import time
import warnings
from collections.abc import Iterator
from functools import partial
from statistics import median

import pytest

from fxquant.core.errors import OptionError
from fxquant.core.host import Timing, sample_interleaved, time_runs, timing, warn_if_busy


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
    samples = sample_interleaved([lambda: clock.task(slow), lambda: clock.task(fast)])
    assert [median(values) for values in samples] == [500.0, 250.0]


def test_warm_up_and_rare_pauses_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # Compilation on the first call, then a preemption in two of five rounds.
    seconds = iter([9.0, 0.01, 0.01, 3.0, 0.01, 3.0, 0.01])
    (values,) = sample_interleaved([lambda: clock.task(seconds)], rounds=5)
    assert median(values) == pytest.approx(10.0)


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(monkeypatch), list[str]()

    def run(name: str) -> None:
        order.append(name)
        clock.now += 1.0

    sample_interleaved([lambda: run("a"), lambda: run("b")], rounds=3)
    assert order == ["a", "a", "b", "b", *"ababab"]


def test_quick_callables_are_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(monkeypatch), itertools.count()

    def run() -> None:
        next(calls)
        clock.now += timing.INNER_SECONDS / 8

    (values,) = sample_interleaved([run], rounds=2)
    assert median(values) == pytest.approx(timing.INNER_SECONDS / 8 * 1e3)
    assert next(calls) >= 2 + 2 * 7


class Machine(Clock):
    """A clock whose CPU time passes apart from the wall: others take turns, and caches slow whole rounds down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.own = 0.0
        monkeypatch.setattr(time, "process_time", lambda: self.own)

    def work(self, seconds: float, waiting: float = 0.0) -> None:
        self.own += seconds
        self.now += seconds / (1.0 - waiting)


def test_one_thread_counts_the_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    for threads, expected in ((1, 10.0), (2, 20.0), (None, 20.0)):
        (timing,) = time_runs([lambda: machine.work(0.01, waiting=0.5)], threads)
        assert timing.milliseconds == pytest.approx(expected)
        assert timing.waiting == pytest.approx(0.5)


def test_rounds_that_are_slow_for_all_change_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, draw = Machine(monkeypatch), random.Random(0)
    # Each callable is called twice to warm up, and once in each round.
    pace = [1.0] * 6 + [level for _ in range(15) for level in [draw.choice((1.0, 1.4, 1.9))] * 3]
    paces = iter(pace)
    truth = (0.02, 0.03, 0.05)
    timings = time_runs([partial(lambda t: machine.work(t * next(paces)), t) for t in truth], 1)
    assert [t.milliseconds for t in timings] == pytest.approx([1e3 * t for t in truth])
    assert [t.outliers for t in timings] == [0.0] * 3
    assert all(t.spread < 1e-9 for t in timings)


def test_a_round_that_is_slow_for_one_is_an_outlier(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    odd = itertools.chain([0.02, 0.02, 0.02, 0.2], itertools.repeat(0.02))
    timings = time_runs([lambda: machine.work(next(odd)), *[lambda: machine.work(0.01)] * 2], 1, rounds=10)
    assert [t.milliseconds for t in timings] == pytest.approx([20.0, 10.0, 10.0])
    assert [t.outliers for t in timings] == [0.1, 0.0, 0.0]


def test_a_busy_machine_is_said(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    warn_if_busy([Timing(1.0, waiting=0.05), Timing(1.0, waiting=0.9), Timing(1.0, waiting=0.02)])
    warn_if_busy([])
    assert not recwarn
    warn_if_busy([Timing(1.0, waiting=0.3)])
    assert "waited 30 % of the time" in str(recwarn.pop(UserWarning).message)


@pytest.mark.parametrize("figures", [(0.0,), (-1.0,), (1.0, -0.1), (1.0, 0.0, 2.0), (1.0, 0.0, 0.0, 1.5)])
def test_figures_that_are_no_timing(figures: tuple[float, ...]) -> None:
    with pytest.raises(OptionError, match="no timing"):
        Timing(*figures)


def test_rounds_and_runs_there_must_be() -> None:
    assert time_runs([]) == []
    with pytest.raises(OptionError, match="rounds=1"):
        time_runs([int], rounds=1)
