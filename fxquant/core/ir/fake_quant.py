"""The fake-quant node: quantize and dequantize in float, differentiable through the straight-through estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.core.ir.grid import Grid
from fxquant.core.ir.levels import HIGHEST_LEVEL, LOWEST_LEVEL, nearest_level
from fxquant.core.ir.spec import QuantSpec

FINEST_SHARE = 2.0**-8
"""How fine a learned step may become, against where it began: beyond, the optimizer's stride was too long for it."""


class FakeQuantize(nn.Module):
    """Simulates one grid: `(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale`.

    On a grid with levels it is `scale * (the nearest level of x / scale)`. The gradient with respect to x is 1 inside
    the grid and 0 outside (straight-through, Bengio et al. 2013). After `learn()` scale is a parameter with the
    gradient of `round_learned`, and so are levels with that of `round_to_levels`; the values are the same to the bit.

    Args:
        grid: copied; scales become float32 and zero-points int32.
    """

    scale: Tensor
    zero_point: Tensor
    levels: Tensor | None
    finest: Tensor | None

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.spec = grid.spec
        self.register_buffer("scale", grid.scale.detach().float().clone())
        self.register_buffer("zero_point", grid.zero_point.detach().to(torch.int32).clone())
        self.register_buffer("levels", None if grid.levels is None else grid.levels.clone())
        # Not part of the state: a checkpoint has the same tensors whether steps are learned or not.
        self.register_buffer("finest", None, persistent=False)

    def learn(self, on: bool = True) -> None:
        """Make scale and levels parameters, or buffers again with the values that are in force then."""
        known = self.grid
        del self.scale, self.levels
        if on:
            self.scale, self.finest = nn.Parameter(known.scale), known.scale * FINEST_SHARE
            self.levels = None if known.levels is None else nn.Parameter(known.levels.float())
        else:
            self.register_buffer("scale", known.scale)
            self.register_buffer("levels", known.levels)
            self.finest = None

    @property
    def grid(self) -> Grid:
        """The grid in force, with copies of its scales, zero-points and levels."""
        levels = None if self.levels is None else whole_levels(self.levels.detach()).to(torch.int8)
        return Grid(self.spec, self.step.detach().clone(), self.zero_point.clone(), levels)

    @property
    def step(self) -> Tensor:
        """The scale in force: a learned one never lies below `FINEST_SHARE` of where it began."""
        if self.finest is None:
            return self.scale
        # An optimizer may overshoot below zero. The gradient goes through all the same: with a plain clamp such a step
        # would get none and never come back.
        return torch.where(self.scale < self.finest, self.scale - self.scale.detach() + self.finest, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid, of the same shape and type."""
        spec, scale, with_gradient = self.spec, self.step, torch.is_grad_enabled()
        if self.levels is not None:
            return round_to_levels(x, scale, self.levels, spec.channel_axis or 0)
        if with_gradient and self.finest is not None:
            return round_learned(x, scale, self.zero_point, spec)
        if spec.channel_axis is None and x.dtype == torch.float32 and not (with_gradient and x.requires_grad):
            return _rounded(x, scale, self.zero_point, spec.qmin, spec.qmax)
        if spec.channel_axis is None:
            return torch.fake_quantize_per_tensor_affine(x, scale, self.zero_point, spec.qmin, spec.qmax)
        return torch.fake_quantize_per_channel_affine(
            x, scale, self.zero_point, spec.channel_axis, spec.qmin, spec.qmax
        )

    def extra_repr(self) -> str:
        """Return the grid in one line."""
        return f"bits={self.spec.bits}, signed={self.spec.signed}, channel_axis={self.spec.channel_axis}"


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return the same to the bit by plain arithmetic: PyTorch's own op also writes a mask for the gradient.

    Passes in place, each of them vectorised, take an eighth of the time.
    """
    q = (x * scale.reciprocal()).round_()
    if zero_point.device.type == "cpu" and not torch.compiler.is_compiling():
        # Bounds that are moved instead of the values save two passes; elsewhere reading the number would wait.
        middle = int(zero_point)
        return q.clamp_(qmin - middle, qmax - middle).mul_(scale).to(x.dtype)
    return q.add_(zero_point).clamp_(qmin, qmax).sub_(zero_point).mul_(scale).to(x.dtype)


class _LearnedRound(torch.autograd.Function):
    """One scale for all of x; PyTorch's own op takes thrice the time, half of that of training ResNet-20."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        rounded: Tensor | None,
        ends: tuple[int, int],
        pace: float,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point, rounded)
        ctx.ends, ctx.pace = ends, pace
        y = _rounded(x, scale, zero_point, *ends)
        return y if rounded is None else torch.lerp(x, y, rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None, None, None]:
        (gradient,), (x, scale, zero_point, rounded) = gradients, ctx.saved_tensors
        # Made again from x, which the op in front keeps anyway, so that training needs no more memory.
        exact = x * scale.reciprocal()
        level = exact.round().add_(zero_point)
        ended = level.clamp(*ctx.ends)
        # A mask of floats: products with booleans take ten times as long.
        inside = level.eq_(ended)
        slope = ended.sub_(zero_point).sub_(exact.mul_(inside)).mul_(gradient)
        if rounded is not None:
            slope.mul_(rounded)
            inside.sub_(1).mul_(rounded).add_(1)
        to_x = inside.mul_(gradient) if ctx.needs_input_grad[0] else None
        return to_x, (slope.sum() * ctx.pace).reshape(scale.shape), None, None, None, None


_learned_round: Callable[[Tensor, Tensor, Tensor, Tensor | None, tuple[int, int], float], Tensor] = _LearnedRound.apply


def round_learned(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, rounded: Tensor | None = None
) -> Tensor:
    """Return x on the grid, differentiable in x and in scale (learned step size, arXiv 1902.08153, eq. 3).

    `d/dx = 1` inside the grid and 0 outside; `d/dscale = (q - zero_point) - x / scale` inside and `q - zero_point`
    outside, times `1 / sqrt(elements per scale x qmax)`, which keeps steps and weights learning at one pace.

    Args:
        x: float32.
        scale: float32, shape `()` or `(channels,)`, above 0.
        zero_point: int32 of the shape of scale.
        spec: the grid.
        rounded: ones where x is rounded, zeros where it passes as it is (QDrop), of the shape and type of x; None
            rounds everywhere. Only for one scale.
    """
    pace = (x.numel() / max(1, scale.numel()) * max(1, spec.qmax)) ** -0.5
    if spec.channel_axis is None:
        per_tensor: Tensor = _learned_round(x, scale, zero_point, rounded, (spec.qmin, spec.qmax), pace)
        return per_tensor
    per_channel: Tensor = torch._fake_quantize_learnable_per_channel_affine(
        x, scale, zero_point.to(scale.dtype), spec.channel_axis, spec.qmin, spec.qmax, pace
    )
    return per_channel


def whole_levels(levels: Tensor) -> Tensor:
    """Return learned levels as integers of int8, ascending along the last axis, of the same type and shape."""
    return levels.round().clamp(LOWEST_LEVEL, HIGHEST_LEVEL).sort(dim=-1).values


def round_to_levels(x: Tensor, scale: Tensor, levels: Tensor, channel_axis: int = 0) -> Tensor:
    """Return `scale * (nearest level of x / scale)`, of the shape of x, differentiable in x, scale and float levels.

    `d/dx = 1` between the outer levels and 0 beyond; `d/dscale = level - x / scale` between and `level` beyond, with
    the pace of `round_learned`; `d/dlevel` adds up the gradients of the values rounded to it, times scale.

    Args:
        x: float32.
        scale: float32, shape `(channels,)`, above 0.
        levels: shape `(channels, L)`: int8, ascending, or learned float32 that `whole_levels` makes such.
        channel_axis: axis of x that counts channels.
    """
    rows = x.movedim(channel_axis, 0)
    shape, rows = rows.shape, rows.flatten(1)
    known = whole_levels(levels.detach().float())
    exact = rows / scale.unsqueeze(1)
    q = nearest_level(exact.detach(), known)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or levels.requires_grad):
        inside = (exact.detach() >= known[:, :1]) & (exact.detach() <= known[:, -1:])
        if levels.requires_grad:
            # Straight through: the value is that of the whole level, the gradient that of the learned one.
            ordered = levels.sort(dim=-1).values
            index = (q.unsqueeze(2) == known.unsqueeze(1)).to(torch.uint8).argmax(dim=2)
            learned = ordered.gather(1, index)
            q = q + (learned - learned.detach())
        pace = (exact.shape[1] * max(1.0, float(known.abs().max()))) ** -0.5
        paced = scale.detach() + (scale - scale.detach()) * pace
        exact = rows / paced.unsqueeze(1)
        q, scale = q + (exact - exact.detach()) * inside, paced
    return (q * scale.unsqueeze(1)).reshape(shape).movedim(0, channel_axis).to(x.dtype)
