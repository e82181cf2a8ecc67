"""What a batch normalisation knew of its input, kept after it was folded away."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Of one batch normalisation `y = factor (a - mean) + shift`, folded into the op in front of it.

    With them the input a is recovered from the folded op's output: `a = (y - shift) / factor + mean`.

    Args:
        factor: `gamma / sqrt(variance + eps)`, shape (channels,).
        shift: beta, shape (channels,).
        mean: running mean of a, shape (channels,).
        variance: running variance of a, shape (channels,), >= 0.
    """

    factor: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class NormStatistics:
    """Name of the folded op -> what was known of its unfolded output; channels are on axis 1."""

    folded: dict[str, Statistics]
