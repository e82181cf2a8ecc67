"""GPTQ: round weights one by one, later ones compensating the error of earlier ones (arXiv 2210.17323)."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from fxquant.core.errors import FailureError
from fxquant.core.ir import Program, RowGrid, WeightFormat
from fxquant.passes.formats import (
    RATIOS,
    MeasuredRounder,
    Patches,
    RowProblem,
    diagonal_of,
    sampled_rows,
    squared_error,
)
from fxquant.passes.rounding.closed_form.column_grid import ColumnGrid, by_columns, by_rows
from fxquant.passes.rounding.closed_form.few_patches import Sweep, sweep_of
from fxquant.passes.rounding.closed_form.input_gram import Moments
from fxquant.passes.rounding.closed_form.layerwise import on_own_grid, round_layerwise
from fxquant.passes.rounding.closed_form.verdict import judged
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask

DAMPING = 0.01
"""Share of the mean diagonal added to the diagonal (section 3, step 3)."""

BLOCK = 128
"""Columns whose corrections are applied to all later columns at once (section 3, step 2)."""

SURE = 0.7
"""Share of nearest rounding's error that every row of a sample errs by at most where the others are not compared."""

ATTEMPTS = 12


@ROUNDERS.register("gptq")
def gptq(task: RoundingTask) -> Program:
    """Round each layer's weight so that its output on the quantized network's images stays near the float weight's.

    `min_Q tr((W - Q) H (W - Q)')` greedily, damping 1 %, columns of large `H_jj` first ("act-order"); arXiv 2210.17323,
    eq. 2 and algorithm 1. Scales stay those of the grid.
    """
    started = time.perf_counter()
    rounding = round_layerwise(task, gptq_rows, "gptq")
    return judged(task, rounding, "gptq", time.perf_counter() - started)


@ROUNDERS.register("gptq_rescaled")
def gptq_rescaled(task: RoundingTask) -> Program:
    """GPTQ with each channel's scale searched too, for the least output error of GPTQ itself on that scale.

    The paper takes scales as given; the grids found go with the rounding.
    """
    started = time.perf_counter()
    rounding = round_layerwise(task, gptq_rows, "gptq_rescaled", fit=with_best_scales)
    return judged(task, rounding, "gptq_rescaled", time.perf_counter() - started)


def with_best_scales(problem: RowProblem, own: RowGrid, weight: WeightFormat) -> tuple[RowGrid, Tensor]:
    """Return the grid with each channel's scale `s_c = argmin_r d' H d`, `d = w_c - rounded(w_c; r s)`, r of `RATIOS`.

    The plan's scales minimise `|d|^2` of nearest rounding; under H, and with an algorithm that compensates errors,
    others are better.
    """
    return on_own_grid(problem, replace(problem, ratios=RATIOS).rescaled(own), weight)


def gptq_rows(moments: Moments, damping: float = DAMPING, ordered: bool = True, block: int = BLOCK) -> MeasuredRounder:
    """Return how GPTQ rounds weights that read this input.

    With `U' U = (H + damping mean(H_jj) I)^-1`, U upper triangular: column j is rounded to `q`, its error `e = (w_j -
    q) / U_jj` is subtracted from later columns, `w_k <- w_k - e U_jk`. A row whose output error would then exceed
    nearest rounding's is rounded to nearest (a guard that the paper lacks: damping and clamped corrections can do
    harm). Of a large weight, the rows of a sample are compared first. Weights of inputs that are always zero are
    rounded to nearest and correct nothing.

    Args:
        moments: of the op's input; only `gram` is read.
        damping: share of the mean diagonal added to it, above 0.
        ordered: largest diagonal first, else the weight's own order.
        block: columns of a block, at least 1; speed only.

    Raises:
        FailureError: H cannot be factored, however damped: it is not finite.
    """
    return gptq_rounder(moments.gram, damping, ordered, block)


def gptq_rounder(
    gram: Tensor | Patches, damping: float = DAMPING, ordered: bool = True, block: int = BLOCK
) -> MeasuredRounder:
    """Return how GPTQ rounds weights whose input has these second moments; as `gptq_rows`.

    Factors are found in float64; columns are rounded, and errors weighed, in float32, which takes half of the time.
    """
    gram, unit = _in_units(gram)
    diagonal, weighing = diagonal_of(gram), Patches(gram.rows.float()) if isinstance(gram, Patches) else gram.float()
    order = diagonal.argsort(dim=1, descending=True, stable=True) if ordered else _positions(diagonal)
    if isinstance(gram, Patches):
        patches = gram.rows.gather(2, order.unsqueeze(1).expand_as(gram.rows))
        sweep = sweep_of(patches, _added(diagonal, damping)[:, 0], block)
    else:
        sweep = _sweep(*_inverse_root(_permuted(gram, order), damping), block)

    def outcome(rows: Tensor, grid: RowGrid) -> tuple[Tensor, Tensor]:
        columns, ours = sweep(by_columns(rows, order), grid)
        found, some = by_rows(columns, order), sampled_rows(rows)
        if some is not None and bool((ours[:, some] < SURE * nearest_error(rows[:, some], grid.rows(some))[1]).all()):
            return found, unit * ours
        plain, theirs = nearest_error(rows, grid)
        return torch.where((ours < theirs).unsqueeze(2), found, plain), unit * torch.minimum(ours, theirs)

    def nearest_error(rows: Tensor, grid: RowGrid) -> tuple[Tensor, Tensor]:
        plain = grid.nearest(rows)
        return plain, squared_error((rows - grid.value(plain)).float(), weighing)

    return MeasuredRounder(outcome)


def _in_units(gram: Tensor | Patches) -> tuple[Tensor | Patches, Tensor]:
    """Return H in units of its mean diagonal, so that it is within the range of float32, and these, shape (groups, 1).

    Which integers are found does not depend on the unit.
    """
    mean = diagonal_of(gram).mean(dim=1, keepdim=True)
    unit = torch.where(mean > 0, mean, torch.ones_like(mean))
    if isinstance(gram, Patches):
        return Patches(gram.rows / unit.sqrt().unsqueeze(2)), unit
    return gram / unit.unsqueeze(2), unit


def _sweep(inverse_root: Tensor, added: Tensor, block: int) -> Sweep:
    """Return how columns are rounded one after the other with `U` of `gptq_rows`, of H and what was added to it."""
    # Row j holds what the errors of earlier columns take from column j.
    lower = inverse_root.transpose(1, 2).float().contiguous()
    own = lower.diagonal(dim1=1, dim2=2).unsqueeze(2)

    def sweep(columns: Tensor, grid: RowGrid) -> tuple[Tensor, Tensor]:
        # A block is corrected for all earlier blocks in one product, a column for its block's earlier ones in another.
        columns = columns.float()
        by_column = ColumnGrid(grid, columns)
        chosen, errors = torch.empty_like(columns), torch.empty_like(columns)
        for start in range(0, columns.shape[1], block):
            stop = min(start + block, columns.shape[1])
            left = columns[:, start:stop] - lower[:, start:stop, :start] @ errors[:, :start]
            for j in range(start, stop):
                column = left[:, j - start] - (lower[:, j : j + 1, start:j] @ errors[:, start:j]).squeeze(1)
                chosen[:, j] = q = by_column.nearest(column)
                errors[:, j] = (column - by_column.value(q)) / own[:, j]
        # The errors that were passed on add up to `d' (H + added) d`.
        difference = columns - by_column.grid.value(chosen.transpose(1, 2)).transpose(1, 2)
        damped = (difference.square() * added.unsqueeze(2)).sum(dim=1)
        return chosen, (errors.square().sum(dim=1) - damped).clamp(min=0)

    return sweep


def _added(diagonal: Tensor, damping: float) -> Tensor:
    """Return what is added to H's diagonal, shape (groups, K)."""
    mean = diagonal.mean(dim=1, keepdim=True)
    # A group that read only zeros gets the identity, so that none of its weights corrects another.
    return torch.where(mean > 0, damping * mean, torch.ones_like(mean)).expand_as(diagonal)


def _positions(diagonal: Tensor) -> Tensor:
    return torch.arange(diagonal.shape[1], device=diagonal.device).expand_as(diagonal)


def _permuted(gram: Tensor, order: Tensor) -> Tensor:
    rows = gram.gather(1, order.unsqueeze(2).expand_as(gram))
    return rows.gather(2, order.unsqueeze(1).expand_as(gram))


def _inverse_root(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return U of `U' U = (H + added)^-1`, upper triangular, each group on its own, and what was added, (groups, K)."""
    added = _added(diagonal_of(gram), damping)
    for _ in range(ATTEMPTS):
        root, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(added))
        if not failed.any():
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
            if not failed.any() and torch.isfinite(upper).all():
                return upper, added
        # Round-off can make a nearly singular H indefinite; ten times the damping is tried.
        added = added * 10.0
    raise FailureError(
        "the second moments of the inputs cannot be factored: activations of the network are not finite; "
        "check the model on the calibration images"
    )
