"""Estimate how long scoring will take: one batch of each estimator is measured, timed, and kept as finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from fxquant.passes.sensitivity.cell_sweep import Work
from fxquant.passes.sensitivity.pair_choice import suffix_cost
from fxquant.passes.sensitivity.registry import Estimator
from fxquant.passes.sensitivity.scorer import Scorer


class _EndedError(Exception):
    """The estimator's work is known."""


class _Timed:
    """Times the first missing cell of every sweep, once where estimators share one.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.seconds = 0.0
        #: every sweep has batches left beside the one that is timed
        self.whole = True
        #: seconds of one whole-network pass over one image, of the first sweep
        self.of_a_pass: float | None = None
        self._known: set[str] = set()

    def of(self, name: str, work: Work, images: Sequence[int], scorer: Scorer) -> None:
        new = name not in self._known
        missing = [key for key in work if new and scorer.store.get(f"{scorer.prefix}{key}") is None]
        # Of a single batch nothing is left to foresee.
        self.whole = self.whole and len(missing) != 1
        if len(missing) > 1:
            first, sizes = missing[0], dict(zip(work, images, strict=True))
            began = self._clock()
            cell = work[first]()
            spent = self._clock() - began
            scorer.store.put(f"{scorer.prefix}{first}", cell)
            self.seconds += spent / sizes[first] * sum(sizes[key] for key in missing[1:])
            if self.of_a_pass is None:
                self.of_a_pass = spent / float(cell["evaluations"])
        self._known.add(name)
        raise _EndedError


def expected_seconds(
    scorer: Scorer, estimators: Iterable[Estimator], clock: Callable[[], float] = time.perf_counter
) -> float | None:
    """Return the seconds that the estimators will take together, without what is finished already.

    The cell of one batch of each is measured for that, and kept as a finished one.

    Args:
        scorer: alone; the work of several processes is not foreseen.
        estimators: that will be run.
        clock: seconds.

    Returns:
        None where the work of an estimator is not known before it has begun, or is all in one batch.
    """
    wanted = list(estimators)
    if any(each.work == "own" for each in wanted):
        return None
    timed = _Timed(clock)
    scorer.preview = timed
    try:
        for each in wanted:
            with suppress(_EndedError):
                _ = each(scorer)
    finally:
        scorer.preview = None
    pairs = any(each.work == "pairs" for each in wanted)
    if not timed.whole or (pairs and timed.of_a_pass is None):
        return None
    return timed.seconds + (_pair_passes(scorer) * (timed.of_a_pass or 0.0) if pairs else 0.0)


def _pair_passes(scorer: Scorer) -> float:
    """Return the whole-network passes over one image that all pairs of columns take."""
    cost = [suffix_cost(scorer, column) for column in scorer.columns]
    total, deeper, owners = 0.0, 0.0, scorer.owners
    own: dict[str, float] = {}
    for k in reversed(scorer.by_depth):
        if beyond := deeper - own.get(owners[k], 0.0):
            total += cost[k] + beyond
        deeper += cost[k]
        own[owners[k]] = own.get(owners[k], 0.0) + cost[k]
    return total * len(scorer.images)
