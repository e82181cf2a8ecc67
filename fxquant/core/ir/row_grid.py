"""`RowGrid`: a weight's grid laid out by rows, as algorithms that round row by row take it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.core.errors import OptionError
from fxquant.core.ir.grid import SMALLEST_SCALE, Grid
from fxquant.core.ir.levels import nearest_level
from fxquant.core.ir.spec import QuantSpec, weight_spec
from fxquant.core.ir.weight_format import MAX_BITS


@dataclass(frozen=True, eq=False)
class RowGrid:
    """The values that each row of a weight (groups, rows, K) may take: `(q - zero_point) * scale`.

    Args:
        spec: width and sign of the integers.
        scale: float64, shape (groups, rows, 1).
        zero_point: float64, of the same shape.
        levels: the integers that each row may use, shape (groups, rows, L), ascending; None for all of the spec.

    Raises:
        OptionError: shapes that do not go together.
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor
    levels: Tensor | None = None

    def __post_init__(self) -> None:
        levels = self.scale if self.levels is None else self.levels
        if self.scale.shape != self.zero_point.shape or self.scale.shape[:2] != levels.shape[:2]:
            shapes = [tuple(part.shape) for part in (self.scale, self.zero_point, levels)]
            raise OptionError(
                f"scale, zero_point, levels of rows have shapes {shapes}; give them the same first two axes"
            )

    @staticmethod
    def of(grid: Grid, groups: int, channels: int) -> RowGrid:
        """Return a grid by rows; a grid of one scale gives it to every row.

        Args:
            grid: of a weight.
            groups: of the op that reads it.
            channels: rows of all groups.
        """
        shape = (groups, channels // groups, -1)
        scale, zero_point = (part.expand(channels).double().reshape(shape) for part in (grid.scale, grid.zero_point))
        levels = None if grid.levels is None else grid.levels.double().reshape(shape)
        return RowGrid(grid.spec, scale, zero_point, levels)

    @staticmethod
    def on_levels(scale: Tensor, levels: Tensor) -> RowGrid:
        """Return the grid of given int8 levels (groups, rows, L), with scales (groups, rows, 1) as float32 has them."""
        scale = scale.float().clamp(min=SMALLEST_SCALE).double()
        return RowGrid(weight_spec(MAX_BITS), scale, torch.zeros_like(scale), levels)

    def rows(self, which: slice | Tensor) -> RowGrid:
        """Return the grid of these rows of each group."""
        levels = None if self.levels is None else self.levels[:, which]
        return replace(self, scale=self.scale[:, which], zero_point=self.zero_point[:, which], levels=levels)

    def grid(self, channel_axis: int = 0) -> Grid:
        """Return the same as the grid of the whole weight, scales in float32."""
        levels = None if self.levels is None else self.levels.flatten(0, 1).to(torch.int8)
        spec = replace(self.spec, channel_axis=channel_axis)
        return Grid(spec, self.scale.reshape(-1).float(), self.zero_point.reshape(-1).to(torch.int32), levels)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the nearest integers for values of shape (groups, rows, n), in the type of x."""
        if self.levels is not None:
            return nearest_level(x / self.scale, self.levels)
        return torch.clamp(torch.round(x / self.scale) + self.zero_point, self.spec.qmin, self.spec.qmax)

    def value(self, q: Tensor) -> Tensor:
        """Return the values of integers of shape (groups, rows, n)."""
        return (q - self.zero_point) * self.scale

    def chosen(self, other: RowGrid, rows: Tensor) -> RowGrid:
        """Return this grid with the rows of another where `rows`, bool of shape (groups, rows), is True."""
        if self.levels is None and other.levels is None and self.spec == other.spec:
            levels = None
        else:
            mine, theirs = _same_length(self.integers(), other.integers())
            levels = torch.where(rows.unsqueeze(2), theirs, mine)
        spec = self.spec if levels is None else weight_spec(MAX_BITS, self.spec.channel_axis or 0)
        scale, zero_point = (
            torch.where(rows.unsqueeze(2), theirs, mine)
            for theirs, mine in ((other.scale, self.scale), (other.zero_point, self.zero_point))
        )
        return RowGrid(spec, scale, zero_point, levels)

    def integers(self) -> Tensor:
        """Return the integers that each row may use, shape (groups, rows, L), ascending."""
        if self.levels is not None:
            return self.levels
        every = torch.arange(self.spec.qmin, self.spec.qmax + 1, dtype=self.scale.dtype, device=self.scale.device)
        return every.expand(*self.scale.shape[:2], -1)


def _same_length(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with the number of levels of the longer one, the largest repeated."""
    longest = max(one.shape[2], two.shape[2])
    padded = (torch.cat([each, each[..., -1:].expand(-1, -1, longest - each.shape[2])], dim=2) for each in (one, two))
    first, second = padded
    return first, second
