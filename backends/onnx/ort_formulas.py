"""How ONNX Runtime requantizes: one float32 factor, rounding half to even, then the zero-point (onnxruntime 1.31)."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.backends.affine import ByteGrid
from fxquant.backends.exact import Operands, Pool, Sums, centred, f32, fma


def quantize(x: Tensor, grid: ByteGrid) -> Tensor:
    """Return a float32 tensor on a grid."""
    return torch.round(x / f32(grid.scale)) + grid.zero_point


def _total(found: Sums) -> Tensor:
    # The bias is part of the int32 accumulator.
    return (found.sums if found.bias is None else found.sums + found.bias).float()


def weighted(found: Sums, addend: Tensor | None, grid: ByteGrid | None, out: ByteGrid | None) -> Tensor:
    """Return the levels, or the real values, of a convolution or linear layer; no kernel adds an operand."""
    assert addend is None
    assert grid is None
    step = f32(found.x_scale) * found.scales
    if out is None:
        return _total(found) * step
    return torch.round(_total(found) * (step / f32(out.scale))) + out.zero_point


def add(operands: Operands, out: ByteGrid) -> Tensor:
    """Return the levels of a sum."""
    a, left, b, right = operands
    step = f32(out.scale)
    one, other = f32(left.scale) / step, f32(right.scale) / step
    fixed = out.zero_point - fma(one, f32(left.zero_point), other * right.zero_point)
    return torch.round(fma(a.float(), one, fma(b.float(), other, fixed)))


def mul(operands: Operands, out: ByteGrid) -> Tensor:
    """Return the levels of a product."""
    a, left, b, right = operands
    factor = f32(left.scale) * f32(right.scale) / f32(out.scale)
    return torch.round(centred(a, left) * centred(b, right) * factor + out.zero_point)


def mean(total: Tensor, pixels: int, grid: ByteGrid, out: ByteGrid) -> Tensor:
    """Return the levels of a mean over images."""
    return torch.round(total * (f32(grid.scale) / (f32(out.scale) * pixels))) + out.zero_point


def average(q: Tensor, grid: ByteGrid, pool: Pool, out: ByteGrid) -> Tensor:
    """Return the levels of a mean over windows."""
    return torch.round(pool(centred(q, grid) * f32(grid.scale)) / f32(out.scale) + out.zero_point)
