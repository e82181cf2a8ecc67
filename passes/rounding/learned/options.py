"""The settings of the reconstruction engine; profiles are rows of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fxquant.core.facts import Options, rules
from fxquant.passes.rounding.learned.units import check_granularity


@dataclass(frozen=True)
class Reconstruction(Options):
    """How each unit is tuned.

    `loss = rec + prediction * pd + feature * feat + regulariser * sum(1 - |2h - 1|^beta)`, with `rec` the squared error
    of the unit's outputs summed over channels, `pd = KL(softmax(p / T) || softmax(z / T))` of the network's answer, and
    `feat` the squared error of the values that the last weighted op reads.

    Args:
        unit: "layer", "layers:k" (k neighbouring ones), "block", a number of neighbouring blocks, "stage" or "network".
        iterations: steps of the optimizer for each unit.
        batch: images of a step.
        learned: "rounding" (AdaRound: up or down, scales fixed) or "straight_through" (values and scales, LSQ).
        rounding_lr: Adam's rate for the rounding logits.
        weight_lr: Adam's rate for straight-through weights, as a share of each channel's step.
        step_lr: Adam's rate for activation steps, falling to 0 as a cosine; 0 keeps them as calibrated.
        level_lr: Adam's rate for weight scales and for levels that are not evenly spaced, relative to the scale and to
            the space between levels, while directions are learned; falling likewise, 0 keeps them.
        activation_start: where activation steps start: as "calibrated" on the float network, or found again for each
            unit behind the "quantized" one.
        step_share: whether that rate is relative to each step, or absolute as published.
        inputs: "quantized" (from the quantized network in front), "float", or "mixed" half and half by element.
        drop: probability that an element of an activation stays unrounded (QDrop); 0 is off.
        regulariser: weight of the term that drives each h to 0 or 1.
        warmup: share of the iterations without that term.
        prediction: weight of the prediction difference; 0 is off.
        prediction_every: period in steps of the prediction term, whose weight is multiplied by it.
        prediction_where: "always", or only where the network is "unsure" of the images it is tuned on: where it knows
            them by heart, prediction and correction are left out, with a note. A weight that is given is kept.
        temperature: T.
        feature: weight of the penultimate features' error; 0 is off.
        normalise: divide each error by its value at nearest rounding, so that weights are comparable across units.
        answer_by_prediction: tune the unit that computes the network's answer by the prediction term alone, also where
            its weight is 0.
        correction: Adam steps of distribution correction of the float inputs; 0 is off. Without batch normalisation
            it is left out, with a note.
        correction_weight: weight of the distance between corrected and original inputs, `1 / lambda_c`.
        guard: leave a unit as it was where the held-out loss of the network up to it rises by half, and its outputs on
            held-out images go farther from the float network's.
        seconds: time for the steps of all units together; those that lose most are tuned as far as it goes, and the
            others stay as they were. 0 tunes all.
        memory_mb: megabytes for cached values; beyond it they are kept in bfloat16, then computed again.

    Raises:
        OptionError: a value out of range.
    """

    KIND: ClassVar[str] = "rounding option"

    unit: str = "block"
    iterations: int = field(default=1000, metadata=rules(least=1))
    batch: int = field(default=32, metadata=rules(least=1))
    learned: Literal["rounding", "straight_through"] = "rounding"
    rounding_lr: float = field(default=1e-2, metadata=rules(least=0))
    weight_lr: float = field(default=1e-2, metadata=rules(least=0))
    step_lr: float = field(default=5e-4, metadata=rules(least=0))
    step_share: bool = True
    level_lr: float = field(default=0.0, metadata=rules(least=0))
    activation_start: Literal["calibrated", "quantized"] = "calibrated"
    inputs: Literal["quantized", "float", "mixed"] = "mixed"
    drop: float = field(default=0.5, metadata=rules(least=0, most=1))
    regulariser: float = field(default=0.05, metadata=rules(least=0))
    warmup: float = field(default=0.2, metadata=rules(least=0, most=1))
    prediction: float = field(default=0.0, metadata=rules(least=0))
    prediction_every: int = field(default=1, metadata=rules(least=1))
    prediction_where: Literal["always", "unsure"] = "always"
    temperature: float = field(default=4.0, metadata=rules(above=0))
    feature: float = field(default=0.0, metadata=rules(least=0))
    normalise: bool = True
    answer_by_prediction: bool = False
    correction: int = field(default=0, metadata=rules(least=0))
    correction_weight: float = field(default=50.0, metadata=rules(least=0))
    guard: bool = True
    seconds: float = field(default=0.0, metadata=rules(least=0))
    memory_mb: int = field(default=2048, metadata=rules(least=1))

    def __post_init__(self) -> None:
        if isinstance(self.unit, int):
            object.__setattr__(self, "unit", str(self.unit))
        super().__post_init__()
        check_granularity(self.unit)

    def changed(self, overrides: Mapping[str, object]) -> Reconstruction:
        """Return these settings with some of them replaced.

        Raises:
            OptionError: there is no such setting, or a value out of range.
        """
        return Reconstruction.of(self, **overrides)

    @property
    def wants_answers(self) -> bool:
        """Whether the suffix of the network is run."""
        return self.prediction > 0 or self.feature > 0
