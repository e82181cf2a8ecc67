"""The codebook format: each channel has `2^bits` int8 levels of its own choice, or all channels share them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.core.ir import (
    FORMAT_KINDS,
    HIGHEST_LEVEL,
    LOWEST_LEVEL,
    SMALLEST_SCALE,
    RowGrid,
    WeightFormat,
)
from fxquant.passes.formats.problem import RowProblem
from fxquant.passes.formats.registry import FORMATS, find

STEPS = 12
"""Steps of Lloyd's algorithm; the error hardly falls after that."""

SAMPLE = 1 << 16
"""Values of a weight that a shared table is found from."""

LEVEL_BITS = 8
"""Bits that store one level of a table."""


@FORMATS.register("codebook")
def codebook(problem: RowProblem, bits: float) -> RowGrid:
    """Return the levels of least error: uniform ones, or tables by Lloyd's algorithm, for each row or for all.

    Lloyd starts from the uniform levels and from quantiles and weighs each value by `H_jj`; levels are then rounded to
    int8 at the scale `max|w| / 127`. Each row keeps what has the smallest error under the rounder: k-means clips tails,
    which an algorithm that moves values beyond them pays for. A table for each row has to pay for its bytes: one bit
    for each weight divides the error by four (6 dB), so what minimises `stored bits + n / 2 log2(error)` is taken.
    """
    width = int(bits)
    rows, table = problem.rows.shape[0] * problem.rows.shape[1], LEVEL_BITS << width
    tried = [(rows * table, _own_tables(problem, width)), (table, _shared_table(problem, width))]
    if width >= FORMAT_KINDS["uniform"].least:
        tried.insert(0, (0, find(problem, WeightFormat(width))))
    return min(tried, key=lambda each: _stored(problem, each[1], each[0]))[1]


def _stored(problem: RowProblem, grid: RowGrid, table_bits: int) -> float:
    """Return bits of the tables, and of the error in the bits that would undo it."""
    error = float(problem.error(grid).sum())
    return table_bits + (problem.rows.numel() / 2 * math.log2(error) if error > 0 else -math.inf)


def _own_tables(problem: RowProblem, bits: int) -> RowGrid:
    starts = [_quantiles(problem.rows, 1 << bits)]
    best: RowGrid | None = None
    if bits >= 2:
        best = find(problem, WeightFormat(bits))
        starts.append(best.value(best.integers()))
    for start in starts:
        tried = _on_int8(lloyd(problem.rows, start, problem.importance))
        best = tried if best is None else problem.better(best, tried)
    assert best is not None
    return problem.rescaled(best)


def _shared_table(problem: RowProblem, bits: int) -> RowGrid:
    """Return one table for all rows, each with its own scale."""
    rows = problem.rows
    size = rows.square().mean(dim=2, keepdim=True).sqrt().clamp(min=SMALLEST_SCALE)
    pooled = (rows / size).reshape(1, 1, -1)
    weights = (problem.importance.expand_as(rows) * size.square()).reshape(1, 1, -1)
    stride = max(1, pooled.shape[2] // SAMPLE)
    pooled, weights = pooled[..., ::stride], weights[..., ::stride]
    levels = lloyd(pooled, _quantiles(pooled, 1 << bits), weights)
    unit = levels.abs().amax().clamp(min=SMALLEST_SCALE) / HIGHEST_LEVEL
    whole = (levels / unit).round().clamp(LOWEST_LEVEL, HIGHEST_LEVEL).expand(*rows.shape[:2], -1)
    grid = RowGrid.on_levels(size * unit, whole)
    # The scale of least error for each row, whatever the table was found from.
    q = grid.nearest(rows)
    weight = problem.importance
    fitted = (rows * q * weight).sum(dim=2, keepdim=True) / (q.square() * weight).sum(dim=2, keepdim=True)
    fitted = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, grid.scale)
    return problem.rescaled(problem.better(grid, RowGrid.on_levels(fitted, whole)))


def lloyd(values: Tensor, levels: Tensor, weights: Tensor, steps: int = STEPS) -> Tensor:
    """Return levels after steps of Lloyd's algorithm: assign to the nearest, then take weighted means.

    Args:
        values: shape (groups, rows, n).
        levels: where to start, shape (groups, rows, L), ascending.
        weights: at least 0, broadcastable to values.
        steps: how many; the levels stay ascending at each.
    """
    weights = weights.expand_as(values)
    for _ in range(steps):
        borders = ((levels[..., 1:] + levels[..., :-1]) / 2).contiguous()
        index = torch.searchsorted(borders, values.contiguous())
        counts = torch.zeros_like(levels).scatter_add_(2, index, weights)
        sums = torch.zeros_like(levels).scatter_add_(2, index, weights * values)
        levels = torch.where(counts > 0, sums / counts, levels)
    return levels


def _quantiles(values: Tensor, count: int) -> Tensor:
    """Return `count` evenly spaced quantiles of each row, ascending."""
    ordered = values.sort(dim=2).values
    places = ((torch.arange(count, device=values.device) + 0.5) / count * values.shape[2]).long()
    return ordered[..., places.clamp(max=values.shape[2] - 1)]


def _on_int8(levels: Tensor) -> RowGrid:
    """Return real levels as int8 integers, at the scale that gives the largest of each row all of int8."""
    scale = (levels.abs().amax(dim=2, keepdim=True) / HIGHEST_LEVEL).float().clamp(min=SMALLEST_SCALE).double()
    return RowGrid.on_levels(scale, (levels / scale).round().clamp(LOWEST_LEVEL, HIGHEST_LEVEL))
