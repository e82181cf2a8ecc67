"""The one rule by which a rounding is accepted or rejected, for units, algorithms, chains and feedback alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fxquant.core.facts import UnitRecord
from fxquant.core.run import Loss


def accepted(before: float | None, after: float | None, keeps_before: bool = True, keeps_after: bool = True) -> bool:
    """Return whether a rounding stays: it must lower the loss that decides.

    A tie is a rejection: without a gain the plan stays as it was, which is simpler and already verified. A loss that is
    not a number counts as infinite. Limits on answers come before the loss: one that breaks limits which are kept
    without it is rejected whatever it gains.

    Args:
        before: loss without the rounding, None where none was measured, which is no reason to reject.
        after: the same with it.
        keeps_before: whether limits on answers are kept without it.
        keeps_after: whether they are kept with it.
    """
    if keeps_before != keeps_after:
        return keeps_after
    return before is None or after is None or _comparable(after) < _comparable(before)


def decisive(losses: Sequence[float]) -> float:
    """Return what decides between roundings whose mean losses on several sets of images are known: the geometric mean.

    A set counts by how much a rounding divides its loss, whatever the size of the loss there. A loss of the user's that
    falls below 0 has no such ratio: it is the plain mean.

    Args:
        losses: mean loss on each set; at least one.
    """
    if any(loss < 0 for loss in losses):
        return sum(losses) / len(losses)
    return math.prod(losses) ** (1 / len(losses))


def least(losses: Sequence[float]) -> int:
    """Return the position of the rounding to take, the first of those with the least loss."""
    return min(range(len(losses)), key=lambda position: _comparable(losses[position]))


def rejection(before: float | None, after: float | None, loss: str | Loss) -> str:
    """Return why a rounding is rejected, "" where it is accepted.

    Args:
        before: as for `accepted`.
        after: as for `accepted`.
        loss: the loss, or its name.
    """
    return "" if accepted(before, after) else f"{loss} does not fall: {before:.4g} before, {after:.4g} after"


def record_of(
    name: str,
    method: str,
    before: float | None,
    after: float | None,
    reason: str,
    seconds: float,
    sites: tuple[str, ...] = (),
) -> UnitRecord:
    """Return the record of a unit, kept where there is no reason against it; losses not measured become NaN."""
    known, found = (math.nan if loss is None else loss for loss in (before, after))
    return UnitRecord(name, method, known, found, not reason, reason, seconds, sites)


def _comparable(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
