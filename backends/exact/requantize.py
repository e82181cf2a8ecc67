"""Requantization: how a runtime rounds exact sums of integers to 8 bits, in its own order of float32 operations.

Integer accumulation is the same everywhere; what differs is the last step in float32: which scales are multiplied
first, whether the zero-point is added before or after rounding, whether a product and a sum are fused. Each backend
holds its own formulas, found by trial: single operators with exhaustive inputs, or scales that put thousands of sums
next to a tie; `tests/backends/exact/test_requantize.py` repeats the trial.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.backends.affine import ByteGrid
from fxquant.core.ir import arguments


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


JoinFormula = Callable[[Node, Sequence[ByteGrid], ByteGrid], Callable[..., Tensor]]
"""An op without weights, the grids of its inputs and of its output -> what computes the levels of uint8 inputs."""


@dataclass(frozen=True)
class Requantization:
    """The formulas of one runtime; each returns whole numbers in float, not yet clamped to the grid.

    Args:
        quantize: a float32 tensor and a grid.
        layers: kind of a weighted op -> its formula.
        joins: kind of an op without weights -> its formula; what has none is computed in float and quantized.
        adding: kinds of weighted ops whose kernel adds a uint8 operand before the only rounding.
        joined: a convolution's node and int8 weight -> shape of the input -> `Sums.joined`; None where it is never so.
        named: name of a weighted op's node -> its formula where that is another one.
    """

    quantize: Callable[[Tensor, ByteGrid], Tensor]
    layers: Mapping[str, LayerFormula]
    joins: Mapping[str, JoinFormula]
    adding: frozenset[str] = frozenset()
    joined: Callable[[Node, Tensor], Callable[[tuple[int, ...]], bool]] | None = None
    named: Mapping[str, LayerFormula] = field(default_factory=dict)


def pairwise(formula: Callable[[Operands, ByteGrid], Tensor]) -> JoinFormula:
    """Return the formula of an op on two operands."""

    def of(node: Node, grids: Sequence[ByteGrid], out: ByteGrid) -> Callable[..., Tensor]:
        del node
        return lambda a, b: formula((a, grids[0], b, grids[1]), out)

    return of


def image_mean(formula: Callable[[Tensor, int, ByteGrid, ByteGrid], Tensor]) -> JoinFormula:
    """Return the formula of a mean over images: totals (float32, without zero-point), pixels per image, two grids."""

    def of(node: Node, grids: Sequence[ByteGrid], out: ByteGrid) -> Callable[..., Tensor]:
        keep = bool(arguments(node).get("keepdim", True))

        def levels(q: Tensor) -> Tensor:
            # int32 as in the kernels: float32 would round sums of large images.
            total = (q.to(torch.int32) - grids[0].zero_point).sum((-2, -1), keepdim=keep).float()
            return formula(total, q.shape[-1] * q.shape[-2], grids[0], out)

        return levels

    return of


def window_mean(formula: Callable[[Tensor, ByteGrid, Pool, ByteGrid], Tensor]) -> JoinFormula:
    """Return the formula of a mean over windows: uint8, its grid, the pooling, and the output grid."""

    def of(node: Node, grids: Sequence[ByteGrid], out: ByteGrid) -> Callable[..., Tensor]:
        # The op itself pools: it knows window, padding and what counts as inside.
        target, rest = node.target, node.args[1:]
        assert callable(target)

        def pool(x: Tensor) -> Tensor:
            pooled: Tensor = target(x, *rest)
            return pooled

        return lambda q: formula(q, grids[0], pool, out)

    return of


def f32(value: float) -> Tensor:
    """Return a number as a float32 tensor of shape ()."""
    return torch.tensor(value, dtype=torch.float32)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return `a b + c` of float32 tensors, rounded once: products of two are exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def centred(q: Tensor, grid: ByteGrid) -> Tensor:
    """Return `q - zero_point` as float32."""
    return q.float() - grid.zero_point
