"""The codebook format: each channel uses `2^bits` int8 levels of free choice; channels may share a table of them."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.core.ir import (
    FORMAT_KINDS,
    HIGHEST_LEVEL,
    LOWEST_LEVEL,
    SMALLEST_SCALE,
    RowGrid,
    WeightFormat,
)
from fxquant.passes.formats.evenly_spaced import nearest_grid
from fxquant.passes.formats.problem import RowProblem
from fxquant.passes.formats.registry import FORMATS, find

STEPS = 12
"""Steps of Lloyd's algorithm; the error hardly falls after that."""

SAMPLE = 1 << 14
"""Values of a weight that a shared table is found from."""

SHARES, ALL = (4, 16), 0
"""How many rows may share a table, beside all of them."""

WORTH_ROUNDING_TWICE = 0.02
"""Share of the error of a large weight that even levels in some of its rows must save."""

EXACT = 1e-9
"""What a power of two may be below itself."""

LEVEL_BITS = 8
"""Bits that store one level of a table."""


@FORMATS.register("codebook")
def codebook(problem: RowProblem, bits: float) -> RowGrid:
    """Return the `floor(2^bits)` levels of least error: uniform ones, or tables by Lloyd's algorithm.

    Lloyd starts from the uniform levels and from quantiles and weighs each value by `H_jj`; levels are then rounded to
    int8 at the scale that gives the largest all of int8. A table serves one row, 4 or 16 rows, or all. It has to pay
    for its bytes: one bit for each weight divides the error by four (6 dB), so what minimises `stored bits + n / 2
    log2(error)` is taken. Where uniform levels err less under the rounder they stay: k-means clips tails, which an
    algorithm that moves values beyond them pays for. Of a large weight, some of the rows decide.
    """
    count, (groups, size, _) = int(2**bits + EXACT), problem.rows.shape
    few = problem.some_rows()

    def table_bits(sharing: int) -> float:
        return count * LEVEL_BITS * groups * few.rows.shape[1] / (sharing or size)

    def stored_in(sharing: int) -> float:
        return _stored(few.to_nearest.error(_tables(few, count, sharing)), few.rows, table_bits(sharing))

    sharing = min((1, *(n for n in SHARES if n < size and size % n == 0), ALL), key=stored_in)
    if float(bits).is_integer() and bits >= FORMAT_KINDS["uniform"].least:
        even = WeightFormat(int(bits))
        spaced, found = find(few, even), few.rescaled(_tables(few, count, sharing))
        # Rows of a shared table keep it; a row with its own may as well have even levels in it.
        mixed = few.better(spaced, found) if sharing == 1 else found
        if _stored(few.error(mixed), few.rows, table_bits(sharing)) >= _stored(few.error(spaced), few.rows, 0):
            return find(problem, even)
        gain = 1 - float(few.error(mixed).sum()) / max(float(few.error(found).sum()), SMALLEST_SCALE)
        if gain > (0 if few is problem else WORTH_ROUNDING_TWICE):
            return problem.better(find(problem, even), problem.rescaled(_tables(problem, count, sharing)))
    return problem.rescaled(_tables(problem, count, sharing))


def _tables(problem: RowProblem, count: int, sharing: int) -> RowGrid:
    """Return tables for nearest rounding, found once: one for each `sharing` rows, or for `ALL`."""
    plain = problem.to_nearest
    own = partial(_own_tables, plain, count)
    make = own if sharing == 1 else partial(_shared_tables, plain, count, sharing or plain.rows.shape[1])
    return plain.once(f"{count} levels for {sharing} rows", make)


def _stored(error: Tensor, rows: Tensor, table_bits: float) -> float:
    """Return bits of the tables, and of the error of all rows in the bits that would undo it."""
    total = float(error.sum())
    return table_bits + (rows.numel() / 2 * math.log2(total) if total > 0 else -math.inf)


def _own_tables(problem: RowProblem, count: int) -> RowGrid:
    """Return a table for each row."""
    ordered = problem.once("ordered", lambda: Ordered(problem.rows, problem.importance))
    best = _on_int8(ordered.lloyd(ordered.quantiles(count)))
    spaced = nearest_grid(problem, max(FORMAT_KINDS["uniform"].least, math.ceil(math.log2(count))))
    # Of an odd number of levels, those around zero.
    levels = spaced.value(spaced.integers())[..., -count:]
    return problem.better(best, _on_int8(ordered.lloyd(levels)))


def _shared_tables(problem: RowProblem, count: int, each: int) -> RowGrid:
    """Return one table for every `each` rows in turn, and a scale for each row."""
    rows, (groups, size, inputs) = problem.rows, problem.rows.shape
    spread = rows.square().mean(dim=2, keepdim=True).sqrt().clamp(min=SMALLEST_SCALE)

    def pooled() -> Ordered:
        values, weights = (
            part.reshape(groups * size // each, 1, each * inputs)
            for part in (rows / spread, problem.importance.expand_as(rows) * spread.square())
        )
        stride = max(1, values.shape[2] // SAMPLE)
        return Ordered(values[..., ::stride], weights[..., ::stride])

    ordered = problem.once(f"ordered by {each}", pooled)
    table = _on_int8(ordered.lloyd(ordered.quantiles(count)))
    unit, levels = (part.expand(-1, each, -1).reshape(groups, size, -1) for part in (table.scale, table.integers()))
    grid = RowGrid.on_levels(spread * unit, levels)
    # The scale of least error for each row, whatever the table was found from.
    q, weight = problem.rounded(grid), problem.importance
    fitted = (rows * q * weight).sum(dim=2, keepdim=True) / (q.square() * weight).sum(dim=2, keepdim=True)
    fitted = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, grid.scale)
    return problem.better(grid, RowGrid.on_levels(fitted, grid.integers()))


class Ordered:
    """Values of each row in ascending order, from which levels are found.

    Args:
        values: shape (groups, rows, n).
        weights: at least 0, broadcastable to values.
    """

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        # Sorted once, a step needs the places of the borders only: sums between them are differences of running sums.
        self.values, index = values.sort(dim=2)
        weights = weights.expand_as(values).gather(2, index)
        self._running = [F.pad(part.cumsum(dim=2), (1, 0)) for part in (weights, weights * self.values)]

    def lloyd(self, levels: Tensor, steps: int = STEPS) -> Tensor:
        """Return levels after steps of Lloyd's algorithm: assign to the nearest, then take weighted means.

        Args:
            levels: where to start, shape (groups, rows, L), ascending.
            steps: how many; the levels stay ascending at each.
        """
        for _ in range(steps):
            borders = (levels[..., 1:] + levels[..., :-1]) / 2
            # A value in the middle between two levels belongs to the lower one.
            places = F.pad(torch.searchsorted(self.values, borders.contiguous(), right=True), (1, 0))
            places = torch.cat([places, torch.full_like(places[..., :1], self.values.shape[2])], dim=2)
            counts, sums = (part.gather(2, places).diff(dim=2) for part in self._running)
            levels = torch.where(counts > 0, sums / counts, levels)
        return levels

    def quantiles(self, count: int) -> Tensor:
        """Return `count` evenly spaced quantiles of each row, ascending."""
        size = self.values.shape[2]
        places = ((torch.arange(count, device=self.values.device) + 0.5) / count * size).long()
        return self.values[..., places.clamp(max=size - 1)]


def _on_int8(levels: Tensor) -> RowGrid:
    """Return real levels as int8 integers, at the scale that gives the largest of each row all of int8."""
    scale = (levels.abs().amax(dim=2, keepdim=True) / HIGHEST_LEVEL).float().clamp(min=SMALLEST_SCALE).double()
    return RowGrid.on_levels(scale, (levels / scale).round().clamp(LOWEST_LEVEL, HIGHEST_LEVEL))
