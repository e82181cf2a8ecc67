"""The uniform format: evenly spaced levels."""

from __future__ import annotations

from fxquant.core.ir import Grid, RowGrid
from fxquant.passes.formats.problem import RowProblem
from fxquant.passes.formats.registry import FORMATS


@FORMATS.register("uniform")
def uniform(problem: RowProblem, bits: float) -> RowGrid:
    """Return `-2^(bits-1) .. 2^(bits-1) - 1` times the scale of least error.

    The scale of least squared error of nearest rounding (`Grid.of_weight`), then the best ratio under the rounder.
    """
    groups, size, _ = problem.rows.shape
    grid = Grid.of_weight(problem.rows.flatten(0, 1), int(bits))
    return problem.rescaled(RowGrid.of(grid, groups, groups * size))
