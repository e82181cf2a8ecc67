"""`Routes`: two plans of one network, and what they cost and lose when each patch runs one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fxquant.core.errors import OptionError
from fxquant.core.ir import Program

HARD, EASY = "hard", "easy"
"""Names of the two plans: of patches whose gradient magnitude is above the threshold, and of all others."""


@dataclass(frozen=True)
class RouteFit:
    """What a router was fitted to.

    Args:
        threshold: gradient magnitude above which a patch is hard, in the unit of the model's input.
        share: share of the fitted patches that are hard, 0..1.
        patches: how many patches it was fitted to.
        used: limit -> mean over these patches of what their plans cost.
        limits: limit -> its value.
        loss: mean loss of these patches, each by its own plan, in the unit of the loss.
        static_loss: the same by the one plan that keeps the limits for every patch.

    Raises:
        OptionError: a share outside 0..1, or a threshold that is no number.
    """

    threshold: float
    share: float
    patches: int
    used: Mapping[str, float]
    limits: Mapping[str, float]
    loss: float
    static_loss: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or math.isnan(self.threshold):
            raise OptionError(f"share={self.share!r} must lie in 0..1, and threshold={self.threshold!r} be a number")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> RouteFit:
        """Read what `to_json` returned."""
        return RouteFit(**document)


@dataclass(frozen=True)
class Routes:
    """Two plans of one network and when each of them runs.

    Args:
        plans: `HARD` and `EASY` -> the network with that plan, its weights rounded.
        fit: the router's threshold, and what it was fitted to.

    Raises:
        OptionError: other names.
    """

    plans: Mapping[str, Program]
    fit: RouteFit

    def __post_init__(self) -> None:
        if set(self.plans) != {HARD, EASY}:
            raise OptionError(f"routes are named {sorted(self.plans)}; give {EASY!r} and {HARD!r}")
