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
    return problem.rescaled(nearest_grid(problem.to_nearest, int(bits)))


def nearest_grid(plain: RowProblem, bits: int) -> RowGrid:
    """Return the evenly spaced levels of least squared error of nearest rounding, searched for once.

    Args:
        plain: `RowProblem.to_nearest`, which keeps it.
        bits: width of the grid.
    """
    groups, size, _ = plain.rows.shape
    rows = plain.rows.flatten(0, 1)
    return plain.once(f"{bits} bits", lambda: RowGrid.of(Grid.of_weight(rows, bits), groups, groups * size))
