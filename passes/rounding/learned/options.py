"""The settings of the reconstruction engine; profiles are rows of them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fxquant.core.errors import OptionError
from fxquant.passes.rounding.learned.units import check_granularity

LEARNED = ("rounding", "straight_through")
"""What is learned for a weight: whether each value is rounded up or down, or the value and its scale."""
INPUTS = ("quantized", "float", "mixed")
"""Which network's values a unit reads while it is tuned."""
PROBABILITIES = ("drop", "warmup")
COUNTS = ("iterations", "batch", "prediction_every", "memory_mb")


@dataclass(frozen=True)
class Reconstruction:
    """How each unit is tuned.

    `loss = rec + prediction * pd + feature * feat + regulariser * sum(1 - |2h - 1|^beta)`, with `rec` the squared error
    of the unit's outputs summed over channels, `pd = KL(softmax(p / T) || softmax(z / T))` of the network's answer, and
    `feat` the squared error of the values that the last weighted op reads.

    Args:
        unit: "layer", "block", a number of neighbouring blocks, "stage" or "network".
        iterations: steps of the optimizer for each unit.
        batch: images of a step.
        learned: "rounding" (AdaRound: up or down, scales fixed) or "straight_through" (values and scales, LSQ).
        rounding_lr: Adam's rate for the rounding logits.
        weight_lr: Adam's rate for straight-through weights, as a share of each channel's step.
        step_lr: Adam's rate for activation steps, falling to 0 as a cosine; 0 keeps them as calibrated.
        step_share: whether that rate is relative to each step, or absolute as published.
        inputs: "quantized" (from the quantized network in front), "float", or "mixed" half and half by element.
        drop: probability that an element of an activation stays unrounded (QDrop); 0 is off.
        regulariser: weight of the term that drives each h to 0 or 1.
        warmup: share of the iterations without that term.
        prediction: weight of the prediction difference; 0 is off.
        prediction_every: period in steps of the prediction term, whose weight is multiplied by it.
        temperature: T.
        feature: weight of the penultimate features' error; 0 is off.
        normalise: divide each error by its value at nearest rounding, so that weights are comparable across units.
        answer_by_prediction: tune the unit that computes the network's answer by the prediction term alone.
        correction: Adam steps of distribution correction of the float inputs; 0 is off. Without batch normalisation
            it is left out, with a note.
        correction_weight: weight of the distance between corrected and original inputs, `1 / lambda_c`.
        guard: keep a unit's result only if the held-out loss of the network up to it falls.
        memory_mb: megabytes for cached values; beyond it they are kept in bfloat16, then computed again.

    Raises:
        OptionError: a value out of range.
    """

    unit: str = "block"
    iterations: int = 1000
    batch: int = 32
    learned: str = "rounding"
    rounding_lr: float = 1e-2
    weight_lr: float = 1e-2
    step_lr: float = 5e-4
    step_share: bool = True
    inputs: str = "mixed"
    drop: float = 0.5
    regulariser: float = 0.05
    warmup: float = 0.2
    prediction: float = 0.0
    prediction_every: int = 1
    temperature: float = 4.0
    feature: float = 0.0
    normalise: bool = True
    answer_by_prediction: bool = False
    correction: int = 0
    correction_weight: float = 50.0
    guard: bool = True
    memory_mb: int = 2048

    def __post_init__(self) -> None:
        for name, known in (("learned", LEARNED), ("inputs", INPUTS)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name}={getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        check_granularity(self.unit)
        for name in (*COUNTS, "correction"):
            lowest = int(name in COUNTS)
            if not isinstance(getattr(self, name), int) or getattr(self, name) < lowest:
                raise OptionError(f"{name}={getattr(self, name)!r} must be a whole number of at least {lowest}")
        for name in PROBABILITIES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise OptionError(f"{name}={getattr(self, name)} must lie in 0..1")
        rates = [f.name for f in fields(self) if f.type == "float" and f.name not in PROBABILITIES]
        for name in rates:
            if not 0.0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name}={getattr(self, name)} must be a finite number of at least 0")
        if self.temperature == 0:
            raise OptionError("temperature=0 must be above 0")

    def changed(self, overrides: Mapping[str, object]) -> Reconstruction:
        """Return these settings with some of them replaced.

        Raises:
            OptionError: there is no such setting, or a value out of range.
        """
        known = [f.name for f in fields(self)]
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise OptionError(f"unknown rounding option {name!r}{hint}; known: {', '.join(known)}")
        values: dict[str, Any] = dict(overrides)
        if isinstance(values.get("unit"), int):
            values["unit"] = str(values["unit"])
        try:
            return replace(self, **values)
        except (TypeError, AttributeError) as error:
            raise OptionError(f"the rounding options {values} contain a value of the wrong type ({error})") from error

    @property
    def wants_answers(self) -> bool:
        """Whether the suffix of the network is run."""
        return self.prediction > 0 or self.feature > 0
