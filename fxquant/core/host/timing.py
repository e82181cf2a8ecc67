"""Timing on a busy machine: interleaved rounds, medians, and a measure of the noise."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxquant.core.errors import OptionError

ROUNDS = 15
INNER_SECONDS = 0.002
"""Each sample repeats its callable for about this long, so that the clock and one preemption matter little."""
FAR = 3.0
"""A round is an outlier from this many quartile ranges beyond the quartiles on."""
LEAST_RANGE = 0.01
"""Quartile ranges count as at least this part of the median: on a quiet machine everything else would be an outlier."""
POLISHES = 20
QUIET = 0.1
"""Quantile of the rounds taken as the idle machine: other processes only slow a run down."""
BUSY = 0.1
"""Share of the wall time spent waiting for a core that is worth a warning."""

Sample = tuple[float, float]
"""Wall and CPU milliseconds of one call in one round."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one callable over the rounds.

    Args:
        milliseconds: the median of the rounds, each taken against how slow that round was for all, above 0.
        spread: range of the quartiles of the same over their median, at least 0.
        outliers: share of rounds far beyond the quartiles, 0..1.
        waiting: share of the wall time in which the process did not run, 0..1: what others took.

    Raises:
        OptionError: a figure out of its range.
    """

    milliseconds: float
    spread: float = 0.0
    outliers: float = 0.0
    waiting: float = 0.0

    def __post_init__(self) -> None:
        good = self.milliseconds > 0 and self.spread >= 0 and 0 <= self.outliers <= 1 and 0 <= self.waiting <= 1
        if not good:
            raise OptionError(f"{self} is no timing: milliseconds above 0, spread at least 0, shares within 0..1")


@dataclass(frozen=True)
class Speed:
    """Milliseconds of one call of a named model: the median over the rounds, and the lower and upper quartile."""

    name: str
    milliseconds: float
    low: float
    high: float


def sample_interleaved(runs: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> list[list[float]]:
    """Return the milliseconds of each callable in each of the interleaved rounds, after a warm-up of each."""
    return [[wall for wall, _ in samples] for samples in _samples(runs, rounds)]


def time_runs(runs: Sequence[Callable[[], object]], threads: int | None = None, rounds: int = ROUNDS) -> list[Timing]:
    """Return the timing of each callable over interleaved rounds, after a warm-up of each.

    Another process slows all callables of a round down alike, so a sample is modelled as `level of the round x time
    of the callable`, both as medians of what the other leaves over (Tukey's median polish of the logarithms, 1977).
    The times are then set to the level of a quick round. In one run on a busy machine, two halves of the rounds of
    twelve networks differed by 2 % this way (standard deviation, at most 5 %), plain medians by 10 to 12 % (at most
    25 %).

    Args:
        runs: what is timed.
        threads: threads that compute. With one, CPU time is what the run would take on an idle machine; with more
            there is no such figure, and the wall clock counts.
        rounds: rounds, at least 2.

    Raises:
        OptionError: fewer than 2 rounds.
    """
    if rounds < 2:
        raise OptionError(f"rounds={rounds} must be at least 2")
    both = np.array(_samples(runs, rounds), dtype=np.float64)
    if not len(both):
        return []
    wall, own = both[..., 0], both[..., 1]
    # A clock that ticks too slowly to see a run at all says no more than that it is short.
    logs = np.log(np.maximum(own if threads == 1 else wall, 1e-6))
    times, levels = np.median(logs, axis=1), np.zeros(rounds)
    for _ in range(POLISHES):
        levels = np.median(logs - times[:, None], axis=0)
        times = np.median(logs - levels, axis=1)
    steady = np.exp(logs - levels + np.quantile(levels, QUIET))
    waiting = np.clip(1.0 - own.sum(axis=1) / np.maximum(wall.sum(axis=1), 1e-9), 0.0, 1.0)
    return [_summarised(values, float(share)) for values, share in zip(steady, waiting, strict=True)]


def warn_if_busy(timings: Sequence[Timing]) -> None:
    """Warn where the process waited for a core for more than `BUSY` of the time, in the median of the timings."""
    waiting = statistics.median(timing.waiting for timing in timings) if timings else 0.0
    if waiting > BUSY:
        warnings.warn(
            f"the machine was busy: this process waited {100 * waiting:.0f} % of the time it was measured; "
            "milliseconds may be off, measure again when nothing else runs",
            stacklevel=2,
        )


def _summarised(values: NDArray[np.float64], waiting: float) -> Timing:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    beyond = FAR * max(high - low, LEAST_RANGE * median)
    outliers = float(((values < low - beyond) | (values > high + beyond)).mean())
    return Timing(median, (high - low) / median, outliers, waiting)


def _samples(runs: Sequence[Callable[[], object]], rounds: int) -> list[list[Sample]]:
    repeats = []
    for run in runs:
        run()
        started = time.perf_counter()
        run()
        repeats.append(max(1, int(INNER_SECONDS / max(1e-7, time.perf_counter() - started))))
    samples: list[list[Sample]] = [[] for _ in runs]
    for _ in range(rounds):
        for index, run in enumerate(runs):
            started, begun = time.perf_counter(), time.process_time()
            for _ in range(repeats[index]):
                run()
            wall, own = time.perf_counter() - started, time.process_time() - begun
            samples[index].append((wall / repeats[index] * 1e3, own / repeats[index] * 1e3))
    return samples
