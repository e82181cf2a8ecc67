"""Statistics of batch normalisations, kept after folding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Statistics of one batch normalisation `y = factor (a - mean) + shift`, folded into the preceding op.

    They recover its input from the folded op's output: `a = (y - shift) / factor + mean`.

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
    """Name of the folded op -> statistics of its output before folding; channels are on axis 1."""

    folded: dict[str, Statistics]
