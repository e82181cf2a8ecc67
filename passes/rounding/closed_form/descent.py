"""Coordinate descent: integers and scales of rounded rows improved in turn, each at its best value given the others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxquant.core.ir import SMALLEST_SCALE, RowGrid
from fxquant.passes.formats import RowProblem, squared_error

BLOCK = 64
"""Columns whose changes are passed on to all later columns at once; speed only."""

ROUNDS = 2


def refined(problem: RowProblem, grid: RowGrid, integers: Tensor, rounds: int = ROUNDS) -> tuple[RowGrid, Tensor]:
    """Return grid and integers of no larger error: one sweep over the columns, then rounds of scales and columns.

    Args:
        problem: the rows, with H.
        grid: of the rows.
        integers: on it, shape (groups, rows, K).
        rounds: how often scales are fitted, each time with a sweep after it.
    """
    integers = swept(problem, grid, integers)
    for _ in range(rounds):
        candidate = rescaled_to(problem, grid, integers)
        moved = swept(problem, candidate, integers)
        better = _error(problem, candidate, moved) < _error(problem, grid, integers)
        grid, integers = grid.chosen(candidate, better), torch.where(better.unsqueeze(2), moved, integers)
    return grid, integers


def swept(problem: RowProblem, grid: RowGrid, integers: Tensor, block: int = BLOCK) -> Tensor:
    """Return integers after one sweep: each column in turn takes its best level while all others stay.

    With `g = (V - T) H`, `v_j <- nearest level to v_j - g_j / H_jj`, which never raises `(V - T) H (V - T)'`.

    Args:
        problem: the rows T, with H.
        grid: of the rows.
        integers: on it, whose values are V.
        block: columns whose changes are passed on to all later columns at once; speed only.
    """
    gram, integers = _gram(problem), integers.clone()
    values = grid.value(integers)
    slope = (values - problem.rows) @ gram
    # A column whose input is always zero has no best value, and stays.
    curvature = gram.diagonal(dim1=1, dim2=2).unsqueeze(1)
    dead, curvature = curvature <= 0, curvature.clamp(min=torch.finfo(gram.dtype).tiny)
    for start in range(0, values.shape[2], block):
        stop = min(start + block, values.shape[2])
        before = values[:, :, start:stop].clone()
        for j in range(start, stop):
            column = values[:, :, j : j + 1]
            best = grid.nearest(column - slope[:, :, j : j + 1] / curvature[:, :, j : j + 1])
            best = torch.where(dead[:, :, j : j + 1], integers[:, :, j : j + 1], best)
            moved = grid.value(best) - column
            slope[:, :, start:stop] += moved * gram[:, j : j + 1, start:stop]
            integers[:, :, j : j + 1], values[:, :, j : j + 1] = best, column + moved
        slope[:, :, stop:] += (values[:, :, start:stop] - before) @ gram[:, start:stop, stop:]
    return integers


def rescaled_to(problem: RowProblem, grid: RowGrid, integers: Tensor) -> RowGrid:
    """Return the grid with the scales of least error for these integers: `s = z H t' / z H z'`, `z = q - zero_point`.

    A row of zeros, or one that would get a negative scale, keeps its own.
    """
    steps = integers - grid.zero_point
    weighed = steps @ _gram(problem)
    scale = (weighed * problem.rows).sum(dim=2, keepdim=True) / (weighed * steps).sum(dim=2, keepdim=True)
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, grid.scale)
    return replace(grid, scale=scale.float().clamp(min=SMALLEST_SCALE).double())


def _gram(problem: RowProblem) -> Tensor:
    assert isinstance(problem.gram, Tensor)
    return problem.gram


def _error(problem: RowProblem, grid: RowGrid, integers: Tensor) -> Tensor:
    return squared_error(problem.rows - grid.value(integers), _gram(problem))
