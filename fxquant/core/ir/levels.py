"""Rounding to levels that are not evenly spaced: the int8 integers that each channel of a weight may use."""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST_LEVEL, HIGHEST_LEVEL = -128, 127
"""What int8 kernels multiply."""


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Return the level nearest to each value, the lower one on ties, in the type of x.

    Args:
        x: shape (..., n), in units of the scale.
        levels: shape (..., L), ascending along the last axis; a row with fewer levels repeats its largest.
    """
    levels = levels.to(x.dtype)
    return levels.gather(-1, torch.searchsorted(borders_of(levels), x.contiguous()))


def borders_of(levels: Tensor) -> Tensor:
    """Return the middles between neighbouring levels, shape (..., L - 1)."""
    return ((levels[..., 1:] + levels[..., :-1]) / 2).contiguous()
