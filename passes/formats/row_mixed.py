"""The row-mixed format: each output channel has a width of its own, at an average that may be a fraction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.core.ir import RowGrid, WeightFormat
from fxquant.passes.formats.problem import RowProblem
from fxquant.passes.formats.registry import FORMATS, find

CHOICES = (*(WeightFormat(bits) for bits in (2, 3, 4, 5, 6, 8)), *(WeightFormat(bits, "codebook") for bits in (2, 3)))
"""Formats that a row may take."""

HALVINGS = 60


@FORMATS.register("row-mixed")
def row_mixed(problem: RowProblem, bits: float) -> RowGrid:
    """Return the widths that minimise `sum_r d_r' H d_r` with at most `bits` stored for each element on average.

    Rows are independent given H, so a Lagrangian solves it up to one row: every row takes the format of least
    `error + price x bits`, the price is found by bisection, and what is left is spent where it gains most. Bits of a
    row's own table count.
    """
    return cheapest_mix(problem, bits, CHOICES)


def cheapest_mix(problem: RowProblem, bits: float, choices: Sequence[WeightFormat]) -> RowGrid:
    """Return the grid of least error whose rows take some of these formats, at most `bits` per element on average."""
    grids = [find(problem, each) for each in choices]
    costs = torch.stack([_row_bits(problem, each) for each in choices], dim=-1)
    errors = torch.stack([problem.error(grid) for grid in grids], dim=-1)
    flat_errors, flat_costs = errors.flatten(0, 1), costs.flatten(0, 1)
    picked = cheapest_rows(flat_errors, flat_costs, bits * problem.rows.numel())
    chosen = picked.reshape(errors.shape[:2])
    found = grids[0]
    for index, grid in enumerate(grids[1:], 1):
        found = found.chosen(grid, chosen == index)
    return found


def cheapest_rows(errors: Tensor, costs: Tensor, limit: float) -> Tensor:
    """Return, for each row, the index of its format: least total error within a limit on the total cost.

    Args:
        errors: shape (rows, formats).
        costs: bits, of the same shape.
        limit: bits of all rows; rows take their cheapest format where even that is more.
    """
    # Formats that cost more and err more than another one are never taken, whatever the price.
    low, high = 0.0, float(errors.max() / costs.clamp(min=1).min()) + 1.0
    at = torch.arange(len(errors), device=errors.device)
    best = (costs + errors * 1e-30).argmin(dim=1)
    for _ in range(HALVINGS):
        price = (low * high) ** 0.5 if low > 0 else high * 2.0**-HALVINGS
        picked = (errors + price * costs).argmin(dim=1)
        if float(costs[at, picked].sum()) <= limit:
            best, high = picked, price
        else:
            low = price
    return _spent(errors, costs, limit, best)


def _spent(errors: Tensor, costs: Tensor, limit: float, picked: Tensor) -> Tensor:
    """Return the choice with what is left of the limit spent on single rows, the largest gain for each bit first."""
    at = torch.arange(len(errors), device=errors.device)
    while True:
        left = limit - float(costs[at, picked].sum())
        gain, more = errors[at, picked, None] - errors, costs - costs[at, picked, None]
        worth = torch.where((gain > 0) & (more <= left), gain / more.clamp(min=1e-9), torch.zeros_like(gain))
        row, column = divmod(int(worth.argmax()), worth.shape[1])
        if float(worth[row, column]) <= 0:
            return picked
        picked = picked.clone()
        picked[row] = column


def _row_bits(problem: RowProblem, weight: WeightFormat) -> Tensor:
    """Return the bits that store each row in a format, its table included, shape (groups, rows)."""
    table = 8 * (1 << int(weight.bits)) if weight.kind == "codebook" else 0
    return torch.full(problem.rows.shape[:2], weight.bits * problem.rows.shape[2] + table, dtype=torch.float64)
