"""Timing that survives a busy machine: interleaved rounds, median of several."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

ROUNDS = 15
INNER_SECONDS = 0.002
"""Each sample repeats its callable for about this long, so that the clock and one preemption matter little."""


def time_interleaved(runs: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> list[float]:
    """Return the median milliseconds of each callable over interleaved rounds, after a warm-up of each."""
    return [statistics.median(values) for values in sample_interleaved(runs, rounds)]


def sample_interleaved(runs: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> list[list[float]]:
    """Return the milliseconds of each callable in each of the interleaved rounds, after a warm-up of each."""
    repeats = []
    for run in runs:
        run()
        started = time.perf_counter()
        run()
        repeats.append(max(1, int(INNER_SECONDS / max(1e-7, time.perf_counter() - started))))
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for index, run in enumerate(runs):
            started = time.perf_counter()
            for _ in range(repeats[index]):
                run()
            samples[index].append((time.perf_counter() - started) / repeats[index] * 1e3)
    return samples
