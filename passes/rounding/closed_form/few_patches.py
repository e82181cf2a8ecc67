"""GPTQ where a layer saw fewer patches than a filter has weights: everything in the space of the patches.

With `H = X'X + d I` of n patches X of K values, the correction of later weights by the error of weight j is

    w_k += (w_j - q_j) v_j . x_k,    v_j = M_j x_j / (1 - x_j' M_j x_j),    M_j = (d I + sum_{i >= j} x_i x_i')^-1,

x_j the j-th column of X (Woodbury). That is `4 n^2 K` operations, and `4 n K` for each row of the weight, where the
factors of `H^-1` take `4/3 K^3` and `K^2`. Deep layers of networks for images see few patches of many values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.core.ir import RowGrid
from fxquant.passes.rounding.closed_form.column_grid import ColumnGrid

Sweep = Callable[[Tensor, RowGrid], tuple[Tensor, Tensor]]
"""(columns (groups, K, rows) in the order of rounding, grid) -> integers, same shape, and the error `d' H d` of
each row, shape (groups, rows)."""


def sweep_of(patches: Tensor, added: Tensor, block: int) -> Sweep:
    """Return how weights are rounded column by column, later ones corrected.

    Args:
        patches: X, float64 of shape (groups, n, K), columns in the order of rounding. Factors are found in float64,
            errors passed on in float32.
        added: d, shape (groups,), above 0.
        block: columns that are corrected together.
    """
    directions = _directions(patches, added, block).float()
    patches = patches.float()
    inputs = patches.transpose(1, 2).contiguous()

    def sweep(columns: Tensor, grid: RowGrid) -> tuple[Tensor, Tensor]:
        columns = columns.float()
        by_column, chosen = ColumnGrid(grid, columns), torch.empty_like(columns)
        # Sum of the errors so far times their directions, shape (groups, n, rows).
        moved = columns.new_zeros(len(columns), patches.shape[1], columns.shape[2])
        for start in range(0, columns.shape[1], block):
            stop = min(start + block, columns.shape[1])
            x, v = inputs[:, start:stop], directions[:, start:stop]
            left, products = columns[:, start:stop] + x @ moved, x @ v.transpose(1, 2)
            errors = torch.empty_like(left)
            for j in range(stop - start):
                column = left[:, j] + (products[:, j : j + 1, :j] @ errors[:, :j]).squeeze(1)
                chosen[:, start + j] = q = by_column.nearest(column)
                errors[:, j] = column - by_column.value(q)
            moved += v.transpose(1, 2) @ errors
        difference = columns - by_column.grid.value(chosen.transpose(1, 2)).transpose(1, 2)
        return chosen, (patches @ difference).square().sum(dim=1)

    return sweep


def _directions(patches: Tensor, added: Tensor, block: int) -> Tensor:
    """Return every v_j, shape (groups, K, n).

    A block B of columns of X is taken out of M at once: with `I - B'MB = LL'`, its v are the columns of
    `M B L'^-1 diag(1 / L_jj)`, and M grows by `(M B L'^-1)(M B L'^-1)'`.
    """
    groups, count, size = patches.shape
    identity = torch.eye(count, dtype=patches.dtype, device=patches.device)
    kernel = patches @ patches.transpose(1, 2) + added.reshape(groups, 1, 1) * identity
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
    found = patches.new_empty(groups, size, count)
    for start in range(0, size, block):
        x = patches[:, :, start : start + block]
        seen = inverse @ x
        products = x.transpose(1, 2) @ seen
        root = torch.linalg.cholesky(torch.eye(x.shape[2], dtype=x.dtype, device=x.device) - products)
        # (M B L'^-1)' = L^-1 (M B)'
        spread = torch.linalg.solve_triangular(root, seen.transpose(1, 2), upper=False)
        found[:, start : start + block] = spread / root.diagonal(dim1=1, dim2=2).unsqueeze(2)
        inverse = inverse + spread.transpose(1, 2) @ spread
    return found
