"""The grid of a weight's rows, column by column: rounding one weight of every row at a time, as sweeps do.

Columns lie side by side in memory here, (groups, K, rows), so that a step over all rows reads and writes one stretch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.core.ir import RowGrid, borders_of


class ColumnGrid:
    """Rounds values of shape (groups, rows), one of each row, as `RowGrid` does.

    Args:
        grid: of the rows.
        like: a tensor of the type to work in.
    """

    def __init__(self, grid: RowGrid, like: Tensor) -> None:
        parts = [part if part is None else part.to(like.dtype) for part in (grid.scale, grid.zero_point, grid.levels)]
        scale, zero_point, levels = parts
        assert scale is not None
        assert zero_point is not None
        #: the same grid in that type
        self.grid = RowGrid(grid.spec, scale, zero_point, levels)
        self._scale, self._zero_point = scale.squeeze(2), zero_point.squeeze(2)
        self._borders = None if levels is None else borders_of(levels)

    def nearest(self, values: Tensor) -> Tensor:
        """Return the nearest integers, the lower level on ties where the grid has levels."""
        if self._borders is None:
            return self.grid.nearest(values.unsqueeze(2)).squeeze(2)
        assert self.grid.levels is not None
        places = torch.searchsorted(self._borders, (values / self._scale).unsqueeze(2))
        return self.grid.levels.gather(2, places).squeeze(2)

    def value(self, integers: Tensor) -> Tensor:
        """Return the values of integers."""
        return (integers - self._zero_point) * self._scale


def by_columns(rows: Tensor, order: Tensor) -> Tensor:
    """Return rows (groups, rows, K) as columns (groups, K, rows), in the order (groups, K) of rounding."""
    return rows.transpose(1, 2)[torch.arange(len(rows), device=rows.device).unsqueeze(1), order]


def by_rows(columns: Tensor, order: Tensor) -> Tensor:
    """Return columns (groups, K, rows) in the order of rounding as rows (groups, rows, K) in the weight's own order."""
    found = torch.empty_like(columns)
    found[torch.arange(len(columns), device=columns.device).unsqueeze(1), order] = columns
    return found.transpose(1, 2).contiguous()
