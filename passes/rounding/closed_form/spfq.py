"""SPFQ, stochastic path following: GPFQ that rounds up or down at random, right on average (arXiv 2309.10975)."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Generator, Tensor

from fxquant.core.ir import Program, RowGrid
from fxquant.passes.formats import RowRounder
from fxquant.passes.rounding.closed_form.gpfq import path_following
from fxquant.passes.rounding.closed_form.input_gram import Moments
from fxquant.passes.rounding.closed_form.layerwise import round_layerwise
from fxquant.passes.rounding.closed_form.verdict import judged
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask


@ROUNDERS.register("spfq")
def spfq(task: RoundingTask) -> Program:
    """Round each layer's weight along GPFQ's path, up or down at random.

    The expected value of every weight is GPFQ's target, given the weights before it (Zhang & Saab, arXiv 2309.10975),
    as far as the grid reaches: the paper's error bounds need a grid without ends. Scales stay those of the grid. The
    task's seed decides every draw.
    """
    started = time.perf_counter()
    draws = Generator().manual_seed(task.seed)
    rounding = round_layerwise(task, partial(spfq_rows, draws=draws), "spfq", crossed=True)
    return judged(task, rounding, "spfq", time.perf_counter() - started)


def spfq_rows(moments: Moments, draws: Generator) -> RowRounder:
    """Return how SPFQ rounds weights that read this input: `path_following` with `stochastic` rounding.

    Args:
        moments: of the op's input.
        draws: on the CPU, so that the same seed gives the same weights on every device.
    """

    def quantizer(target: Tensor, grid: RowGrid) -> Tensor:
        uniform = torch.rand(target.shape, generator=draws, dtype=torch.float64)
        return stochastic(target, grid, uniform.to(target.device))

    return path_following(moments, quantizer)


def stochastic(x: Tensor, grid: RowGrid, uniform: Tensor) -> Tensor:
    """Return the integer above each value with probability `(x - low) / (high - low)`, else the one below.

    low and high are the grid's neighbours of x; beyond an end of the grid it is that end.

    Args:
        x: float64, shape (groups, rows, n).
        grid: of the rows.
        uniform: draws from [0, 1), of the shape of x.
    """
    exact = x / grid.scale + grid.zero_point
    if grid.levels is None:
        return torch.floor(exact + uniform).clamp(grid.spec.qmin, grid.spec.qmax)
    levels = grid.levels.to(x.dtype)
    above = torch.searchsorted(levels.contiguous(), exact.contiguous(), right=True)
    low, high = (levels.gather(2, i.clamp(0, levels.shape[2] - 1)) for i in (above - 1, above))
    return torch.where(uniform * (high - low) < exact - low, high, low)
