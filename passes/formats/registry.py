"""The table of weight formats: how the levels of each kind are found."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fxquant.core.ir import Grid, RowGrid, WeightFormat
from fxquant.core.registry import Registry
from fxquant.passes.formats.problem import RowProblem

Finder = Callable[[RowProblem, float], RowGrid]
"""(the weight, bits) -> the grid of each row."""

FORMATS: Registry[Finder] = Registry("weight format")
"""Kind of format -> how its levels are found; the kinds themselves are `FORMAT_KINDS`."""


def find(problem: RowProblem, weight: WeightFormat) -> RowGrid:
    """Return the grid of a weight in a format, found once for each problem."""
    return problem.known(weight, lambda: FORMATS[weight.kind](problem, weight.bits))


def grid_of(problem: RowProblem, weight: WeightFormat, channel_axis: int = 0) -> Grid:
    """Return the same as a grid of the whole weight, whose channels lie along an axis."""
    return find(problem, weight).grid(channel_axis)


def rows_of(weight: Tensor, channel_axis: int = 0, groups: int = 1) -> Tensor:
    """Return a weight as float64 rows (groups, channels of a group, K), one for each output channel."""
    rows = weight.detach().double().movedim(channel_axis, 0).flatten(1)
    return rows.reshape(groups, -1, rows.shape[1])
