"""`weight_mse`: relative error of the rounded values themselves, no image and no network (MixQuant).

Data-free fallback: it measures how well a grid fits a tensor, not how much the tensor matters.
"""

from __future__ import annotations

import numpy as np

from fxquant.core.facts import Histogram, Ranges
from fxquant.core.ir import FakeQuantize, Sites, tensor_at
from fxquant.passes.sensitivity.columns import Column, RoundedWeight
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Scorer


@estimator(
    "weight_mse", float_only=True, unit="relative squared error of weights and activations", images=False, work="own"
)
def weight_mse(scorer: Scorer) -> Estimate:
    """Return `values = diag(|dW|^2 / |W|^2 + sum over values read of step^2 / 12 / E[x^2])`, no run at all.

    The first term is MixQuant's (Kloberdanz & Le, arXiv 2309.17341). The second is the power of uniform rounding noise
    against the power that calibration saw, so that activation bits have a price. Standard errors are 0: no image is
    scored.
    """
    values = np.diag([relative_error(scorer, column) for column in scorer.columns])
    return Estimate(values, np.zeros_like(values), 0.0)


def relative_error(scorer: Scorer, column: Column) -> float:
    """Return noise power over signal power of what a column rounds, its tensors added up; 0 for float."""
    program, total, weights = scorer.program, 0.0, set()
    for name, replacement in column.substitution.items():
        if isinstance(replacement, RoundedWeight):
            # A module used twice has several nodes on one weight, which counts once.
            weights.add(replacement)
        elif isinstance(replacement, FakeQuantize):
            producer = scorer.replay.by_name[name].all_input_nodes[0].name
            total += float(replacement.scale) ** 2 / 12 / mean_square(program[Ranges].histograms[producer])
    for rounded in weights:
        assert column.site is not None
        value = tensor_at(program.module, program[Sites].by_name(column.site).weight).detach().double()
        # A weight of zeros lies on every grid.
        total += float((rounded.value.double() - value).square().sum() / value.square().sum().clamp(min=1e-300))
    return total


def mean_square(histogram: Histogram) -> float:
    """Return E[x^2] of a calibrated value, above 0."""
    power = float((histogram.counts * np.square(histogram.centres)).sum() / histogram.counts.sum())
    return max(power, float(np.finfo(np.float32).tiny))
