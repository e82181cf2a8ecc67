"""Asymmetric weight grids, with a zero-point for each channel, as in PD-Quant; no integer backend runs them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxquant.core.facts import WeightGrids
from fxquant.core.ir import Grid, QuantSpec, tensor_at
from fxquant.passes.rounding.registry import RoundingTask

FRACTIONS = 100
"""Number of range fractions tried."""
POWER = 2.4
"""Exponent of the rounding error that is minimised."""


def asymmetric_grid(weight: Tensor, spec: QuantSpec) -> Grid:
    """Return the grid, each channel's scale and zero_point those of least `mean |w - round_trip(w)|^2.4`.

    Tried are 100 fractions of each channel's own range, and for each of them every zero-point (PD-Quant's code; the
    one-dimensional search is enough where the range does not hold zero).

    Args:
        weight: float32, channels along `spec.channel_axis`.
        spec: grid that is not symmetric.
    """
    axis = spec.channel_axis or 0
    rows = weight.detach().float().movedim(axis, 0).reshape(weight.shape[axis], -1)
    low, high = rows.amin(dim=1).clamp(max=0.0), rows.amax(dim=1).clamp(min=0.0)
    widest = Grid.covering(low, high, spec)
    best_scale, best_zero = widest.scale, widest.zero_point
    best = torch.full_like(low, torch.inf)
    levels = spec.qmax - spec.qmin
    # Where all values lie on one side, another zero-point only wastes levels.
    one_sided = not bool((low < 0).any())
    for fraction in torch.linspace(1.0 / FRACTIONS, 1.0, FRACTIONS).tolist():
        tried = Grid.covering(low * fraction, high * fraction, spec)
        scale, own = tried.scale, tried.zero_point
        # Beyond 4 bits only zero-points near the range's own can win, and all 256 would take minutes.
        every = levels < 16 and not one_sided
        for offset in (0,) if one_sided else range(spec.qmin, spec.qmax + 1) if every else range(-2, 3):
            zero = torch.full_like(own, offset) if every else (own + offset).clamp(spec.qmin, spec.qmax)
            rounded = torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, spec.qmin, spec.qmax)
            error = rounded.sub_(rows).abs_().pow_(POWER).mean(dim=1)
            better = error < best
            best = torch.where(better, error, best)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return Grid(spec, best_scale, best_zero)


def with_asymmetric_grids(task: RoundingTask) -> RoundingTask:
    """Return the task with an asymmetric grid for every weight, and no weights of earlier algorithms."""
    rounding, grids = task.rounding, dict[str, Grid]()
    for site in task.sites:
        known = rounding.grid_of(site.name, task.program[WeightGrids])
        spec = QuantSpec(known.spec.bits, signed=True, symmetric=False, channel_axis=known.spec.channel_axis)
        # Levels are where the weights are, on either side of zero: a zero-point would add nothing.
        free = known.levels is None
        grids[site.name] = asymmetric_grid(tensor_at(task.program.module, site.weight), spec) if free else known
    return replace(task, program=task.program.with_facts(replace(rounding, weights={}, grids=grids)))
