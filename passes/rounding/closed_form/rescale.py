"""Search weight scales for the least output error of the rounding that will be used."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.core.ir import SMALLEST_SCALE, Grid
from fxquant.passes.rounding.closed_form.input_gram import squared_error, to_rows
from fxquant.passes.rounding.closed_form.layerwise import RowRounder

RATIOS = (1.0, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15)
"""Candidate scales as shares of the grid's own; that comes first, and wins ties."""


def with_best_scales(weight: Tensor, grid: Grid, gram: Tensor, rounder: RowRounder) -> Grid:
    """Return the grid with each channel's scale `s_c = argmin_r d' H d`, `d = w_c - rounded(w_c; r s)`, r of `RATIOS`.

    The plan's scales minimise `|d|^2` of nearest rounding; under H, and with an algorithm that compensates errors,
    others are better.

    Args:
        weight: float weight of the site.
        grid: its grid.
        gram: `H` of the site's input, float64 of shape (groups, K, K).
        rounder: the algorithm.
    """
    groups, count = len(gram), len(RATIOS)
    rows = to_rows(weight.detach().double(), groups)
    size = rows.shape[1]
    shape = (groups, 1, size, 1)
    scale, zero_point = (part.expand(weight.shape[0]).double().reshape(shape) for part in (grid.scale, grid.zero_point))
    ratios = torch.tensor(RATIOS, dtype=torch.float64, device=rows.device).reshape(1, count, 1, 1)
    # In float32, as the grid will store them; all candidates are rounded in one run, as rows.
    scales = (scale * ratios).float().clamp(min=SMALLEST_SCALE).double().reshape(groups, count * size, 1)
    points = zero_point.expand(groups, count, size, 1).reshape(groups, count * size, 1)
    stacked = rows.unsqueeze(1).expand(groups, count, size, rows.shape[2]).reshape(groups, count * size, -1)
    integers = rounder(stacked, scales, points, grid)
    error = squared_error(stacked - grid.value(integers, scales, points), gram).reshape(groups, count, size)
    best = error.argmin(dim=1, keepdim=True)
    found = scales.reshape(groups, count, size).gather(1, best).reshape(-1).float()
    return Grid(grid.spec, found, grid.zero_point.expand(weight.shape[0]))
