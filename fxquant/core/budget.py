"""What the plan may cost: several limits at once, absolute or against the float model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from fxquant.core.errors import OptionError


@dataclass(frozen=True)
class Budget:
    """Upper limits on a plan; None means no limit, several hold together.

    Args:
        size_mb: 10^6 bytes really stored for all weights, scales, zero-points and biases.
        size_ratio: the same bytes against those of the float32 parameters.
        average_bits: `sum(bits x weights) / sum(weights)` over every quantized weight.
        bops: bit operations for one sample, `sum(MACs x weight bits x activation bits)`.
        bops_ratio: the same against 32 x 32 bits.
        activation_mb: 10^6 bytes of the activations of one sample that are live at once, at the worst moment.
        latency_ms: milliseconds for one sample on this machine in the target's runtime.
        latency_ratio: the same against the float model in the same runtime.

    Raises:
        OptionError: a limit that is not a finite positive number, or no limit at all.
    """

    size_mb: float | None = None
    size_ratio: float | None = None
    average_bits: float | None = None
    bops: float | None = None
    bops_ratio: float | None = None
    activation_mb: float | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise OptionError(f"budget {name}={value!r} must be a finite number above 0")
        if not self.limits:
            raise OptionError(f"a budget needs at least one limit; give one or more of {', '.join(names)}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: float(value) for name, value in values.items() if value is not None}

    @property
    def needs_latency(self) -> bool:
        """Whether milliseconds have to be measured."""
        return any(name.startswith("latency") for name in self.limits)

    @staticmethod
    def parse(texts: Iterable[str]) -> Budget:
        """Read limits written as `size_mb=0.2`.

        Raises:
            OptionError: not `name=number`, an unknown name, or one name twice.
        """
        known = [field.name for field in fields(Budget)]
        limits: dict[str, float] = {}
        for text in texts:
            name, separator, number = text.partition("=")
            name = name.strip()
            if not separator or name not in known:
                raise OptionError(
                    f"budget {text!r} is not understood; write name=number with one of {', '.join(known)}"
                )
            if name in limits:
                raise OptionError(f"budget {name} is given twice; give it once")
            try:
                limits[name] = float(number)
            except ValueError as error:
                raise OptionError(f"budget {text!r}: {number!r} is not a number") from error
        return Budget(**limits)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self.limits.items())
