"""How ONNX Runtime requantizes: one float32 factor, rounding half to even, then the zero-point (onnxruntime 1.31)."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.backends.affine import ByteGrid
from fxquant.backends.exact import Operands, Pool, Requantization, Sums, centred, f32, fma


def _quantize(x: Tensor, grid: ByteGrid) -> Tensor:
    return torch.round(x / f32(grid.scale)) + grid.zero_point


def _total(found: Sums) -> Tensor:
    # The bias is part of the int32 accumulator.
    return (found.sums if found.bias is None else found.sums + found.bias).float()


def _weighted(found: Sums, out: ByteGrid) -> Tensor:
    factor = (f32(found.x_scale) * found.scales) / f32(out.scale)
    return torch.round(_total(found) * factor) + out.zero_point


def _real(found: Sums) -> Tensor:
    return _total(found) * (f32(found.x_scale) * found.scales)


def _add(operands: Operands, out: ByteGrid) -> Tensor:
    a, left, b, right = operands
    step = f32(out.scale)
    one, other = f32(left.scale) / step, f32(right.scale) / step
    fixed = out.zero_point - fma(one, f32(left.zero_point), other * right.zero_point)
    return torch.round(fma(a.float(), one, fma(b.float(), other, fixed)))


def _mul(operands: Operands, out: ByteGrid) -> Tensor:
    a, left, b, right = operands
    factor = f32(left.scale) * f32(right.scale) / f32(out.scale)
    return torch.round(centred(a, left) * centred(b, right) * factor + out.zero_point)


def _mean(total: Tensor, pixels: int, grid: ByteGrid, out: ByteGrid) -> Tensor:
    return torch.round(total * (f32(grid.scale) / (f32(out.scale) * pixels))) + out.zero_point


def _average(q: Tensor, grid: ByteGrid, pool: Pool, out: ByteGrid) -> Tensor:
    return torch.round(pool(centred(q, grid) * f32(grid.scale)) / f32(out.scale) + out.zero_point)


ORT_FORMULAS = Requantization(
    quantize=_quantize,
    conv=_weighted,
    conv_real=_real,
    linear=_weighted,
    linear_real=_real,
    conv_add=None,
    add=_add,
    mul=_mul,
    mean=_mean,
    average=_average,
)
