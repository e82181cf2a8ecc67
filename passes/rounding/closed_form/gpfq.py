"""GPFQ, greedy path following: each weight compensates the error of those before it (arXiv 2201.11113)."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fxquant.core.ir import Program, RowGrid
from fxquant.passes.formats import RowRounder
from fxquant.passes.rounding.closed_form.input_gram import Moments
from fxquant.passes.rounding.closed_form.layerwise import round_layerwise
from fxquant.passes.rounding.closed_form.verdict import judged
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask

NEGLIGIBLE = 1e-12
"""An input whose energy is below this share of the largest counts as always zero."""


@ROUNDERS.register("gpfq")
def gpfq(task: RoundingTask) -> Program:
    """Round each layer's weight so that its output on the quantized network follows the float network's.

    Unlike GPTQ it also compensates the error of earlier layers: the target is the float weight on the float network's
    values. Scales stay those of the grid; arXiv 2010.11784 and 2201.11113, algorithm 1.
    """
    started = time.perf_counter()
    rounding = round_layerwise(task, gpfq_rows, "gpfq", crossed=True)
    return judged(task, rounding, "gpfq", time.perf_counter() - started)


def gpfq_rows(moments: Moments) -> RowRounder:
    """Return how GPFQ rounds weights that read this input: `path_following` with nearest rounding."""
    return path_following(moments, lambda target, grid: grid.nearest(target))


def path_following(moments: Moments, quantizer: RowRounder) -> RowRounder:
    """Return how weights that read this input are rounded so that they follow the float network's output.

    With `f_t` and `x_t` the float and the quantized network's t-th input over all images, and u = 0 at first:
    `u += w_t f_t`, `q_t = Q(<x_t, u> / |x_t|^2)`, `u -= q_t x_t`. Only inner products are needed:
    `<x_t, u> = sum_{s <= t} w_s G_ts - sum_{s < t} q_s H_ts`. Weights of inputs that were always zero are quantized as
    they are.

    Args:
        moments: of the op's input.
        quantizer: Q, called for one column (groups, rows, 1) after the other.
    """
    gram = moments.gram
    energy = gram.diagonal(dim1=1, dim2=2)
    dead = energy <= NEGLIGIBLE * energy.amax(dim=1, keepdim=True)
    strength = torch.where(dead, torch.ones_like(energy), energy)
    # Its lower triangle sums over s <= t: the outputs of the float network up to each input.
    followed = moments.cross.tril().transpose(1, 2)

    def rounder(rows: Tensor, grid: RowGrid) -> Tensor:
        wanted = rows @ followed
        values, integers = torch.zeros_like(rows), torch.empty_like(rows)
        for t in range(rows.shape[2]):
            # Outputs of the weights that are rounded already, which this one completes.
            spent = values[:, :, :t] @ gram[:, t, :t].unsqueeze(2)
            target = (wanted[:, :, t : t + 1] - spent) / strength[:, t].reshape(-1, 1, 1)
            target = torch.where(dead[:, t].reshape(-1, 1, 1), rows[:, :, t : t + 1], target)
            integers[:, :, t : t + 1] = q = quantizer(target, grid)
            values[:, :, t : t + 1] = grid.value(q)
        return integers

    return rounder
