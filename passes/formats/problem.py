"""One weight whose levels are to be found: its rows, and what an error at them costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxquant.core.ir import SMALLEST_SCALE, RowGrid, WeightFormat

RATIOS = (1.0, 0.9, 1.1, 1.2)
"""Shares of a grid's own scale that are worth trying; its own comes first, and wins ties.

Algorithms that compensate errors move values outward, so that most rows want more than their own scale. These four keep
what 14 shares from 0.65 to 1.4 gain (ResNet-20, GPTQ: output error -9 of -10 % at 3 bits, -24 of -30 % at 2).
"""

CACHED = 1 << 15
"""Values that are rounded together where each is rounded by itself."""

STACKED = 1 << 21
"""Values of all candidates for some rows that are rounded in one run, 16 MB of float64."""

KEPT = 4
"""Grids whose integers are remembered, so that the best one is not rounded to again."""

LARGE = 1 << 20
"""Weights of which a sample of rows tells what suits all of them: rounding all rows takes minutes then."""

SAMPLED, TOGETHER = 256, 16
"""Rows of a sample, of each group, and how many of them lie side by side, as those that share something do."""

T = TypeVar("T")

RowRounder = Callable[[Tensor, RowGrid], Tensor]
"""(weight rows float64 (groups, rows, K), grid of each row) -> integers, same shape; each row is rounded by itself."""


def nearest_rows(rows: Tensor, grid: RowGrid) -> Tensor:
    """Return the nearest integers."""
    return grid.nearest(rows)


@dataclass(frozen=True, eq=False)
class MeasuredRounder:
    """A rounder that knows the error of what it found.

    Args:
        outcome: (rows, grid) -> integers, and `d' H d` of each row, shape (groups, rows), H that of the problem.
    """

    outcome: Callable[[Tensor, RowGrid], tuple[Tensor, Tensor]]

    def __call__(self, rows: Tensor, grid: RowGrid) -> Tensor:
        """Return the integers."""
        return self.outcome(rows, grid)[0]


@dataclass(frozen=True, eq=False)
class Patches:
    """`H = X'X` as X itself, where there are fewer patches than a filter has weights.

    Args:
        rows: X, float64 of shape (groups, patches, K).
    """

    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def diagonal_of(gram: Tensor | Patches) -> Tensor:
    """Return `H_jj`, shape (groups, K)."""
    return gram.rows.square().sum(dim=1) if isinstance(gram, Patches) else gram.diagonal(dim1=1, dim2=2)


def squared_error(difference: Tensor, gram: Tensor | Patches) -> Tensor:
    """Return `d' H d` of every row of a weight difference, that is its output's squared error over all images.

    Args:
        difference: shape (groups, rows, K).
        gram: shape (groups, K, K), or the patches it is made of.

    Returns:
        shape (groups, rows), in squared output units.
    """
    if isinstance(gram, Patches):
        return (difference @ gram.rows.transpose(1, 2)).square().sum(dim=2)
    return ((difference @ gram) * difference).sum(dim=2)


def sampled_rows(rows: Tensor) -> Tensor | None:
    """Return positions of rows of a large weight (groups, rows, K), evenly spread; None where all may be looked at."""
    size = rows.shape[1]
    if rows.numel() < LARGE or size < 2 * SAMPLED:
        return None
    starts = torch.linspace(0, size - TOGETHER, SAMPLED // TOGETHER, device=rows.device).long()
    return (starts.unsqueeze(1) + torch.arange(TOGETHER, device=rows.device)).flatten()


@dataclass(frozen=True, eq=False)
class RowProblem:
    """A weight by rows, how it will be rounded, and how errors are weighed.

    Args:
        rows: float64, shape (groups, rows, K).
        gram: second moments H of the op's input, float64 of shape (groups, K, K), or patches: an error d of a row costs
            `d' H d`.
            None where no input was seen: it costs `d' d`.
        rounder: the algorithm that will round the rows.
        ratios: shares of a scale that are tried under the rounder, the first wins ties; `(1.0,)` keeps scales.
        found: format -> grid that is known already.
        diagonal: what a squared error of each weight costs where there is no gram, shape (groups, 1, K); None for 1.
        outcomes: grid -> integers and error of its rows, of the last grids.
    """

    rows: Tensor
    gram: Tensor | Patches | None = None
    rounder: RowRounder = nearest_rows
    ratios: tuple[float, ...] = (1.0,)
    found: dict[WeightFormat, RowGrid] = field(default_factory=dict, repr=False)
    diagonal: Tensor | None = None
    outcomes: dict[RowGrid, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def importance(self) -> Tensor:
        """What a squared error of each weight costs by itself, shape (groups, 1, K)."""
        if self.gram is not None:
            return diagonal_of(self.gram).unsqueeze(1)
        return torch.ones_like(self.rows[:, :1]) if self.diagonal is None else self.diagonal

    @cached_property
    def to_nearest(self) -> RowProblem:
        """The same weight rounded to nearest, the error of each value by itself: quick, and nearly as good."""
        return RowProblem(self.rows, diagonal=self.importance)

    def some_rows(self) -> RowProblem:
        """Return rows of a large weight, evenly spread, as a problem of their own; of any other the weight itself."""
        kept = sampled_rows(self.rows)
        if kept is None:
            return self
        # A grid by rows goes with its rows; what weighs errors is the same for all.
        own = partial(RowProblem, self.rows[:, kept], self.gram, self.rounder, self.ratios, diagonal=self.diagonal)
        return self.once("some rows", own)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return what is made of the rows alone, made once for all formats."""
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made

    def rounded(self, grid: RowGrid) -> Tensor:
        """Return the integers of the rows on a grid."""
        return self._outcome(grid)[0].to(self.rows.dtype)

    def error(self, grid: RowGrid) -> Tensor:
        """Return what rounding on a grid costs, shape (groups, rows)."""
        return self._outcome(grid)[1]

    def better(self, one: RowGrid, two: RowGrid) -> RowGrid:
        """Return, row by row, the grid of smaller error; the first on ties."""
        (mine, ours), (others, theirs) = self._outcome(one), self._outcome(two)
        rows = theirs < ours
        return self._remember(
            one.chosen(two, rows), torch.where(rows.unsqueeze(2), others, mine), torch.minimum(ours, theirs)
        )

    def rescaled(self, grid: RowGrid) -> RowGrid:
        """Return the grid with each row's scale the best of `ratios` times its own."""
        if len(self.ratios) == 1:
            return grid
        groups, size, inputs = self.rows.shape
        few = max(1, STACKED // (groups * inputs * len(self.ratios)))
        pieces = [slice(start, start + few) for start in range(0, size, few)]
        found = [self._best_ratios(self.rows[:, piece], grid.rows(piece)) for piece in pieces]
        scale, integers, error = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return self._remember(replace(grid, scale=scale), integers, error)

    def _best_ratios(self, rows: Tensor, grid: RowGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scales, integers and errors of some rows at the best of `ratios`."""
        (groups, size, _), count = rows.shape, len(self.ratios)
        ratios = torch.tensor(self.ratios, dtype=rows.dtype, device=rows.device).reshape(1, count, 1, 1)
        # In float32, as the grid will store them; all candidates are rounded in one run, as rows.
        scales = (grid.scale.unsqueeze(1) * ratios).float().clamp(min=SMALLEST_SCALE).double().flatten(1, 2)
        points, levels = (
            None if part is None else part.unsqueeze(1).expand(-1, count, -1, -1).flatten(1, 2)
            for part in (grid.zero_point, grid.levels)
        )
        assert points is not None
        stacked = rows.unsqueeze(1).expand(-1, count, -1, -1).flatten(1, 2)
        integers, error = self._round(stacked, RowGrid(grid.spec, scales, points, levels))
        error = error.reshape(groups, count, size)
        best = error.argmin(dim=1, keepdim=True)
        scale, error = (each.reshape(groups, count, size).gather(1, best).squeeze(1) for each in (scales, error))
        places = best.unsqueeze(3).expand(-1, -1, -1, integers.shape[2])
        taken = integers.reshape(groups, count, size, -1).gather(1, places).squeeze(1)
        return scale.unsqueeze(2), taken.to(torch.int16), error

    def known(self, weight: WeightFormat, find: Callable[[], RowGrid]) -> RowGrid:
        """Return the grid of a format, found once."""
        if weight not in self.found:
            self.found[weight] = find()
        return self.found[weight]

    def _outcome(self, grid: RowGrid) -> tuple[Tensor, Tensor]:
        """Return integers, which fit int16, and the error of every row."""
        if grid not in self.outcomes:
            self._remember(grid, *self._round(self.rows, grid))
        return self.outcomes[grid]

    def _remember(self, grid: RowGrid, integers: Tensor, error: Tensor) -> RowGrid:
        while len(self.outcomes) >= KEPT:
            del self.outcomes[next(iter(self.outcomes))]
        self.outcomes[grid] = integers.to(torch.int16), error
        return grid

    def _round(self, rows: Tensor, grid: RowGrid) -> tuple[Tensor, Tensor]:
        """Return integers and errors of rows; an error is weighed by H, or by the diagonal where there is none."""
        if isinstance(self.rounder, MeasuredRounder) and self.gram is not None:
            return self.rounder.outcome(rows, grid)
        if self.gram is not None:
            integers = self.rounder(rows, grid)
            return integers, squared_error(rows - grid.value(integers), self.gram)
        # Few rows at a time stay in the cache.
        found, errors = [], []
        few = max(1, CACHED // (len(rows) * rows.shape[2]))
        for start in range(0, rows.shape[1], few):
            piece, part = rows[:, start : start + few], grid.rows(slice(start, start + few))
            integers = self.rounder(piece, part)
            found.append(integers.to(torch.int16))
            errors.append(((piece - part.value(integers)).square_() * self.importance).sum(dim=2))
        return torch.cat(found, dim=1), torch.cat(errors, dim=1)
