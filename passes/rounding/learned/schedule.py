"""Which units are tuned where there is not time for all of them."""

from __future__ import annotations

from collections.abc import Sequence

PROBED = 2
"""Steps by which the time of a unit is estimated."""


def affordable(losses: Sequence[float], costs: Sequence[float], seconds: float) -> frozenset[int]:
    """Return the positions of the units to tune: those that lose most, as far as their costs fit into `seconds`.

    A unit's loss is the increment that it realises, `Phi(1..k) - Phi(1..k-1)`, as it is without tuning. A unit that
    does not fit any more is passed over for the next ones.

    Args:
        losses: `Phi(1..k)` of each unit k in order: loss of the network quantized up to it, above 0.
        costs: seconds that tuning each unit takes.
        seconds: to be spent.
    """
    increments = [now - before for now, before in zip(losses, [0.0, *losses], strict=False)]
    chosen, spent = set[int](), 0.0
    for index in sorted(range(len(costs)), key=lambda k: -increments[k]):
        if spent + costs[index] <= seconds:
            chosen.add(index)
            spent += costs[index]
    return frozenset(chosen)
