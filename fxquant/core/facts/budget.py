"""What the plan may cost and what it must keep: several limits at once, absolute or against the float model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Union

from fxquant.core.errors import OptionError
from fxquant.core.registry import unknown

QUALITIES = ("loss", "disagreement", "accuracy_drop")
"""Limits on the answers, measured on held-out images; the others are on costs, known from the plan."""
MINIMIZED = ("size_ratio", "file_ratio", "average_bits", "bops_ratio", "latency_ratio")
"""What may be made small where only the answers are limited."""
EXAMPLE = "'size_mb=0.2'"

BudgetLike = Union["Budget", Mapping[str, Any], Iterable[str]]
"""What stands for a budget wherever one is taken: see `Budget.of`."""


@dataclass(frozen=True)
class Budget:
    """Upper limits on a plan; None means no limit, several hold together.

    With a limit on quality (loss, disagreement, accuracy_drop) the cheapest plan that keeps all limits is searched for.
    At most as many images turn wrong as change their first answer, so `disagreement` bounds the accuracy drop without
    labels.

    Args:
        size_mb: 10^6 bytes stored for all weights, scales, zero-points and biases, the file's other contents left out.
        size_ratio: the same bytes against those of the float32 parameters.
        file_mb: 10^6 bytes of the whole file that the target's runtime reads, as `fxquant export` writes it.
        file_ratio: the same bytes against those of the float model's file.
        average_bits: stored bits per weight over all layers that can be quantized: a width counts as it is stored (its
            tables of levels included), a layer in float as 32, scales and biases as nothing.
        bops: bit operations for one sample, `sum(MACs x weight bits x activation bits)`.
        bops_ratio: the same against 32 x 32 bits.
        activation_mb: peak of the live activations of one sample, in 10^6 bytes.
        latency_ms: milliseconds for one sample on this machine in the target's runtime.
        latency_ratio: the same against the float model in the same runtime.
        loss: mean held-out loss against the float model, in the unit of the loss (KL in nats for class scores).
        disagreement: share 0..1 of the held-out images whose first answer is not the float model's.
        accuracy_drop: drop of top-1 accuracy on held-out images, 0..1; needs labels.
        minimize: the cost to minimize under a quality limit, one of `MINIMIZED`.

    Raises:
        OptionError: a limit that is not a finite number above 0 (of at least 0 for shares), or no limit at all.
    """

    size_mb: float | None = None
    size_ratio: float | None = None
    file_mb: float | None = None
    file_ratio: float | None = None
    average_bits: float | None = None
    bops: float | None = None
    bops_ratio: float | None = None
    activation_mb: float | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    loss: float | None = None
    disagreement: float | None = None
    accuracy_drop: float | None = None
    minimize: str = "size_ratio"

    def __post_init__(self) -> None:
        for name in _names():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise OptionError(f"budget {name}={value!r} must be a finite number")
            # Shares of images may be none at all; a cost or a loss of nothing is never reached.
            if name in QUALITIES[1:] and not 0 <= value <= 1:
                raise OptionError(f"budget {name}={value!r} is a share of images and must lie in 0..1; 0.01 is 1 %")
            if name not in QUALITIES[1:] and value <= 0:
                raise OptionError(f"budget {name}={value!r} must be a finite number above 0")
        if not self.limits and not self.quality:
            raise OptionError(f"a budget needs at least one limit; give one or more of {', '.join(_names())}")
        if self.minimize not in MINIMIZED:
            raise OptionError(f"budget minimize={self.minimize!r} is unknown; known: {', '.join(MINIMIZED)}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits on costs that are set, by name."""
        return {name: value for name, value in self._set().items() if name not in QUALITIES}

    @property
    def quality(self) -> dict[str, float]:
        """The limits on answers that are set, by name."""
        return {name: value for name, value in self._set().items() if name in QUALITIES}

    def _set(self) -> dict[str, float]:
        values = {name: getattr(self, name) for name in _names()}
        return {name: float(value) for name, value in values.items() if value is not None}

    @property
    def needs_latency(self) -> bool:
        """Whether milliseconds have to be measured."""
        return self._counts("latency")

    @property
    def needs_file(self) -> bool:
        """Whether files have to be measured."""
        return self._counts("file")

    def _counts(self, cost: str) -> bool:
        minimized = [self.minimize] if self.quality else []
        return any(name.startswith(cost) for name in (*self.limits, *minimized))

    @staticmethod
    def of(given: BudgetLike) -> Budget:
        """Return the budget that a budget, a mapping or a text stands for.

        Args:
            given: a budget; its arguments by name, `{"average_bits": 4}`; or texts such as "size_mb=0.2,loss=0.01".

        Raises:
            OptionError: a name that is no argument of `Budget`, a name twice, or a value that is not allowed.
        """
        if isinstance(given, Budget):
            return given
        if isinstance(given, str):
            return Budget.of(given.split(","))
        if isinstance(given, Mapping):
            return _made(given.items())
        texts = list(given) if isinstance(given, Iterable) else [given]
        if not all(isinstance(text, str) for text in texts):
            raise OptionError(f"budget {given!r} is not understood; give a Budget, a mapping or a text like {EXAMPLE}")
        return _made(map(_parsed, texts))

    def __str__(self) -> str:
        limits = [f"{name}={value:g}" for name, value in self._set().items()]
        return ", ".join(limits + ([f"minimize={self.minimize}"] if self.quality else []))


def _made(arguments: Iterable[tuple[str, Any]]) -> Budget:
    known, values = [*_names(), "minimize"], dict[str, Any]()
    for name, value in arguments:
        if name not in known:
            raise unknown("budget", str(name), known)
        if name in values:
            raise OptionError(f"budget {name} is given twice; give it once")
        values[name] = value
    return Budget(**values)


def _parsed(text: str) -> tuple[str, float | str]:
    name, separator, value = (part.strip() for part in text.partition("="))
    if not separator:
        raise OptionError(f"budget {text!r} is not understood; write name=number, for example {EXAMPLE}")
    if name not in _names():
        return name, value
    try:
        return name, float(value)
    except ValueError as error:
        raise OptionError(f"budget {text!r}: {value!r} is not a number") from error


def _names() -> list[str]:
    return [field.name for field in fields(Budget) if field.name != "minimize"]
