"""Outlier channel splitting: an input channel is read twice, each time with half its weights.

`w x = (w - s/2)/2 x + (w + s/2)/2 x` is exact, and on a grid of step s both halves together round as w does:
`Q((w - s/2)/2) + Q((w + s/2)/2) = Q(w)`, with twice the range (Zhao et al., ICML 2019, arXiv 1901.09504, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.core.ir import RowGrid


def halves(weight: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return two weights whose sum is the weight: `(w - s/2)/2` and `(w + s/2)/2`, or `w/2` twice without a step.

    Args:
        weight: float, any shape.
        step: s, of a shape that broadcasts to the weight's; None for a grid of no single step.
    """
    shift = torch.zeros_like(weight) if step is None else step.expand_as(weight) / 2
    first = (weight - shift) / 2
    return first, weight - first


def saved_by_splitting(rows: Tensor, grid: RowGrid, importance: Tensor, taps: int) -> Tensor:
    """Return how much squared error each input channel loses by twice the range on the same steps.

    `sum_r sum_t h (Q(w) - w)^2 - h (Q2(w) - w)^2`, Q2 with levels from `2 qmin` to `2 qmax`.

    Args:
        rows: float64, shape (1, rows, channels x taps).
        grid: evenly spaced.
        importance: h, shape (1, 1, channels x taps).
        taps: weights of one input channel.

    Returns:
        shape (channels,), at least 0.
    """
    steps = torch.round(rows / grid.scale)
    once, twice = (
        torch.clamp(steps, factor * grid.spec.qmin, factor * grid.spec.qmax) * grid.scale - rows for factor in (1, 2)
    )
    saved = ((once.square() - twice.square()) * importance).sum(dim=(0, 1))
    return saved.reshape(-1, taps).sum(dim=1)


def split_channels(weight: Tensor, channels: tuple[int, ...], step: Tensor | None) -> Tensor:
    """Return the weight that reads these input channels a second time, behind all others.

    Args:
        weight: shape (outputs, inputs, ...).
        channels: those that are split.
        step: s of every output, shape (outputs,); None without one.

    Returns:
        shape (outputs, inputs + len(channels), ...).
    """
    places = torch.tensor(channels, dtype=torch.long)
    by_row = None if step is None else step.reshape(-1, *[1] * (weight.dim() - 1)).to(weight)
    first, second = halves(weight[:, places], by_row)
    kept = weight.clone()
    kept[:, places] = first
    return torch.cat([kept, second], dim=1)
