"""The power-of-two format: zero and powers of two of either sign (RMSMP, arXiv 2111.00153; APoT, arXiv 1909.13144)."""

from __future__ import annotations

import torch

from fxquant.core.ir import RowGrid
from fxquant.passes.formats.problem import RowProblem
from fxquant.passes.formats.registry import FORMATS

LARGEST = 64
"""The largest power of two that int8 holds with either sign."""

FRACTIONS = 40
SMALLEST_FRACTION = 0.3


@FORMATS.register("pow2")
def powers_of_two(problem: RowProblem, bits: float) -> RowGrid:
    """Return `0, +-64, +-32, ...`, `2^(bits-1) - 1` magnitudes, times the scale of least error.

    Tried are 40 shares of each row's largest magnitude for nearest rounding, then the ratios under the rounder.
    """
    magnitudes = [LARGEST >> k for k in range((1 << (int(bits) - 1)) - 1)]
    levels = torch.tensor(sorted([0, *magnitudes, *(-m for m in magnitudes)]), dtype=problem.rows.dtype)
    largest = problem.rows.abs().amax(dim=2, keepdim=True) / LARGEST
    shape = (*problem.rows.shape[:2], -1)

    def on(scale: torch.Tensor) -> RowGrid:
        return RowGrid.on_levels(scale, levels.to(scale.device).expand(shape))

    nearest, best = RowProblem(problem.rows), on(largest)
    for fraction in torch.linspace(SMALLEST_FRACTION, 1.0, FRACTIONS)[:-1].tolist():
        best = nearest.better(best, on(largest * fraction))
    return problem.rescaled(best)
