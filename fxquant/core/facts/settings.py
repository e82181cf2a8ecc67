"""What a user asks for besides the budget, checked once, carried as a fact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fxquant.core.errors import OptionError
from fxquant.core.ir import Choice


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        estimators: sensitivity estimators, the preferred one first.
        images: calibration images used at most, scoring and verification together.
        refine_moves: plans measured at most to improve the best finalist.
        rounds: times the plan is scored again around itself at most.
        rounding: algorithms that round the plan's weights.
    """

    estimators: tuple[str, ...]
    images: int
    refine_moves: int
    rounds: int
    rounding: str


CHEAP = ("fit", "fisher_out", "weight_mse")
"""Estimators of a few passes: worse models of the loss, but plans of another kind, and the measured loss decides."""

EFFORTS: dict[str, Effort] = {
    "fast": Effort(("diagonal",), 96, 0, 0, "nearest"),
    "default": Effort(("gram", "diagonal", "fisher", *CHEAP), 384, 16, 1, "gptq"),
    "best": Effort(
        ("shrunk", "monotone", "pairs", "gram", "diagonal", "fisher", "hawq", *CHEAP), 1024, 48, 3, "gptq_rescaled"
    ),
}
"""Preset name -> what it measures."""


CONTEXTS = ("float", "widest")
"""What scores may be taken around, before there is a plan."""


@dataclass(frozen=True)
class Settings:
    """Choices that shape the graph and the search.

    Args:
        bits: candidate weight bits; 32 adds "float".
        activation_bits: candidate activation bits.
        target: name of the backend that will run the model.
        pins: pattern of layers (see `core.patterns`) -> the only precision allowed there.
        pin_ends: pin the first and the last site to 8 bits.
        keep_float: patterns of layers that stay in float.
        forbid: pattern of layers -> precisions that may not be used there.
        observer: name of the observer.
        loss: name of the loss; None takes KL for class scores and relative squared error otherwise.
        estimators: sensitivity estimators, the preferred one first.
        context: how everything else is quantized while one layer is scored: "float", or "widest" for every layer at
            its widest integer precision (CalibTIP, arXiv 2006.10518).
        solver: name of the solver.
        time_limit: seconds for each solve.
        held_out: share of the calibration images kept for verification.
        requantization_cost: added to a plan's modelled loss for two neighbouring layers with unlike activation widths.
        refine_moves: plans measured at most to improve the best finalist; 0 leaves it as it is.
        rounds: times the plan is scored again around itself at most, and the program solved near it; 0 does not.
        scoring_rounding: how weights are rounded when layers are scored, and until a plan is rounded: "nearest", or
            "gptq" or "gpfq" layer by layer at every width.
        rounding: algorithms that round the plan's weights, joined by "+".
        seed: seed of every random choice.
        threads: threads of the target's runtime, None for its default.

    Raises:
        OptionError: a value out of range.
    """

    bits: tuple[int, ...] = (2, 4, 8)
    activation_bits: tuple[int, ...] = (8,)
    target: str = "onnxruntime"
    pins: Mapping[str, Choice] = field(default_factory=dict)
    pin_ends: bool = False
    keep_float: tuple[str, ...] = ()
    forbid: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)
    observer: str = "mse"
    loss: str | None = None
    estimators: tuple[str, ...] = EFFORTS["default"].estimators
    context: str = "float"
    solver: str = "iqp"
    time_limit: float = 60.0
    held_out: float = 0.25
    requantization_cost: float = 0.0
    refine_moves: int = EFFORTS["default"].refine_moves
    rounds: int = EFFORTS["default"].rounds
    scoring_rounding: str = "nearest"
    rounding: str = "nearest"
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if not self.bits or not self.activation_bits:
            raise OptionError(
                f"bits={self.bits} and activation_bits={self.activation_bits} need at least one width each"
            )
        if not self.estimators:
            raise OptionError("estimators is empty; name at least one, for example ('gram',)")
        if not 0.0 < self.held_out < 1.0:
            raise OptionError(f"held_out={self.held_out} must lie between 0 and 1")
        if not 0.0 <= self.requantization_cost < math.inf:
            raise OptionError(f"requantization_cost={self.requantization_cost} must be a finite number of at least 0")
        if self.refine_moves < 0:
            raise OptionError(f"refine_moves={self.refine_moves} must be at least 0")
        if self.context not in CONTEXTS:
            raise OptionError(f"context={self.context!r} is unknown; known: {', '.join(CONTEXTS)}")
        if self.rounds < 0:
            raise OptionError(f"rounds={self.rounds} must be at least 0")
        if self.time_limit <= 0:
            raise OptionError(f"time_limit={self.time_limit} must be above 0 seconds")


def effort(name: str) -> Effort:
    """Return a preset.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in EFFORTS:
        raise OptionError(f"unknown effort {name!r}; known: {', '.join(EFFORTS)}")
    return EFFORTS[name]
