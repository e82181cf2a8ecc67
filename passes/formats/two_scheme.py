"""The two-scheme format: rows of one weight at powers of two, at 4 bits or at 8 bits (RMSMP, arXiv 2111.00153)."""

from __future__ import annotations

from fxquant.core.ir import RowGrid, WeightFormat
from fxquant.passes.formats.problem import RowProblem
from fxquant.passes.formats.registry import FORMATS
from fxquant.passes.formats.row_mixed import cheapest_mix

SCHEMES = (WeightFormat(4, "pow2"), WeightFormat(4), WeightFormat(8))
"""What a row may take: powers of two and fixed point at 4 bits, fixed point at 8 bits."""


@FORMATS.register("two-scheme")
def two_scheme(problem: RowProblem, bits: float) -> RowGrid:
    """Return the scheme and width of every row that minimise `sum_r d_r' H d_r`, (bits - 4) / 4 of them at 8 bits.

    RMSMP has one share of each scheme for all layers, takes the rows of 8 bits by the largest eigenvalue of the Hessian
    and those of powers of two by small variance, and trains. Here the output error decides for each row, so that the
    share of powers of two follows from the layer, and that of 8 bits is chosen with the layer's format. Powers of two
    are one table for all rows; int8 kernels run them no faster.
    """
    return cheapest_mix(problem, bits, SCHEMES)
