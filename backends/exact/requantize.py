"""Requantization: how a runtime rounds exact sums of integers to 8 bits, in its own order of float32 operations.

Integer accumulation is the same everywhere; what differs is the last step in float32: which scales are multiplied
first, whether the zero-point is added before or after rounding, whether a product and a sum are fused. Each backend
holds its own formulas, found by trial: single operators with exhaustive inputs, or scales that put thousands of sums
next to a tie; `tests/backends/exact/test_requantize.py` repeats the trial.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.backends.affine import ByteGrid


@dataclass(frozen=True)
class Sums:
    """What an integer layer has accumulated.

    Args:
        sums: integers `sum((x - z_x) w)` without error, float64, or float32 where every sum here stays below 2^24.
        x_scale: step of the input.
        scales: float32 step of the weight per channel, shaped to broadcast against `sums`.
        bias: integers of that type in units of `x_scale x scales`, shaped like `scales`; None without.
        shift: integers of that type `z_x sum(w)` per channel, shaped like `scales`.
        joined: whether the kernel multiplies the two scales before it multiplies the sums.
    """

    sums: Tensor
    x_scale: float
    scales: Tensor
    bias: Tensor | None
    shift: Tensor
    joined: bool = False

    def real_bias(self) -> Tensor:
        """Return the bias in real units as float32, zero without one."""
        return torch.zeros(()) if self.bias is None else self.bias.float() * (f32(self.x_scale) * self.scales)


Operands = tuple[Tensor, ByteGrid, Tensor, ByteGrid]
"""Two uint8 tensors, each with its grid."""

LayerFormula = Callable[[Sums, Tensor | None, ByteGrid | None, ByteGrid | None], Tensor]
"""Sums, an operand to add with its grid, and the output grid (None for float32) -> levels, or real values."""

Pool = Callable[[Tensor], Tensor]
"""Average over windows, or over the image, of a float32 tensor."""


@dataclass(frozen=True)
class Requantization:
    """The formulas of one runtime; each returns whole numbers in float, not yet clamped to the grid.

    Args:
        quantize: a float32 tensor and a grid.
        conv: a convolution's sums and the output grid.
        conv_real: a convolution's sums as float32 real values.
        linear: a linear layer's sums and the output grid.
        linear_real: a linear layer's sums as float32 real values.
        conv_add: a convolution's sums, a uint8 operand that its kernel adds before the only rounding, the operand's
            grid and the output grid; None where no kernel does so.
        add: two operands and the output grid.
        mul: two operands and the output grid.
        mean: totals over images as float32 integers without zero-point, pixels per image, input and output grid.
        average: uint8, its grid, the pooling, and the output grid.
        joins: a convolution's node and int8 weight -> shape of the input -> `Sums.joined`; None where it is never so.
        layers: name of a convolution's node -> its formula where that is another one.
    """

    quantize: Callable[[Tensor, ByteGrid], Tensor]
    conv: Callable[[Sums, ByteGrid], Tensor]
    conv_real: Callable[[Sums], Tensor]
    linear: Callable[[Sums, ByteGrid], Tensor]
    linear_real: Callable[[Sums], Tensor]
    conv_add: Callable[[Sums, Tensor, ByteGrid, ByteGrid], Tensor] | None
    add: Callable[[Operands, ByteGrid], Tensor]
    mul: Callable[[Operands, ByteGrid], Tensor]
    mean: Callable[[Tensor, int, ByteGrid, ByteGrid], Tensor]
    average: Callable[[Tensor, ByteGrid, Pool, ByteGrid], Tensor]
    joins: Callable[[Node, Tensor], Callable[[tuple[int, ...]], bool]] | None = None
    layers: Mapping[str, LayerFormula] = field(default_factory=dict)


def f32(value: float) -> Tensor:
    """Return a number as a float32 tensor of shape ()."""
    return torch.tensor(value, dtype=torch.float32)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return `a b + c` of float32 tensors, rounded once: products of two are exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def centred(q: Tensor, grid: ByteGrid) -> Tensor:
    """Return `q - zero_point` as float32."""
    return q.float() - grid.zero_point
