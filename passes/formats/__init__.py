"""Weight formats: one file for each kind of levels, and the table of them."""

from __future__ import annotations

from fxquant.passes.formats import codebook, evenly_spaced, powers_of_two, row_mixed, two_scheme
from fxquant.passes.formats.problem import (
    RATIOS,
    MeasuredRounder,
    Patches,
    RowProblem,
    RowRounder,
    diagonal_of,
    sampled_rows,
    squared_error,
)
from fxquant.passes.formats.registry import FORMATS, find, grid_of, rows_of
from fxquant.passes.formats.row_mixed import cheapest_rows

del codebook, evenly_spaced, powers_of_two, row_mixed, two_scheme
