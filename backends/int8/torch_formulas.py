"""How PyTorch's integer kernels requantize, eagerly and as Inductor compiles them (oneDNN 3.12 on AVX512-VNNI).

oneDNN scales in two steps, adds a float bias, multiplies by 1 / step and adds the zero-point before it rounds; the
passes between its calls round the exact product of a float32 and a float32 factor. Inductor turns those passes into one
loop without fused products, each operation rounded to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.backends.affine import ByteGrid
from fxquant.backends.exact import LayerFormula, Operands, Pool, Requantization, Sums, centred, f32, fma
from fxquant.backends.int8.kernels import ONE_PASS_FROM, conv_joins_scales
from fxquant.backends.int8.rules import conv_geometry


def _pass(x: Tensor, factor: float, out: ByteGrid) -> Tensor:
    return torch.round(x.double() * f32(factor).double()).float() + out.zero_point


def _torch_quantize(x: Tensor, grid: ByteGrid) -> Tensor:
    return _pass(x, 1.0 / grid.scale, grid)


def _onednn_levels(real: Tensor, out: ByteGrid) -> Tensor:
    return torch.round(real * (1.0 / f32(out.scale)) + out.zero_point)


def _onednn_sum(real: Tensor, q: Tensor, grid: ByteGrid, out: ByteGrid) -> Tensor:
    return _onednn_levels(fma(centred(q, grid), f32(grid.scale), real), out)


def _onednn_real(found: Sums) -> Tensor:
    step, sums = f32(found.x_scale), found.sums.float()
    real = sums * (step * found.scales) if found.joined else sums * step * found.scales
    return real if found.bias is None else real + found.real_bias()


def _onednn_conv(found: Sums, out: ByteGrid) -> Tensor:
    return _onednn_levels(_onednn_real(found), out)


def _onednn_conv_add(found: Sums, q: Tensor, grid: ByteGrid, out: ByteGrid) -> Tensor:
    return _onednn_sum(_onednn_real(found), q, grid, out)


def _product(found: Sums, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return an `_int_mm` product, factor and offset in units of `step`: the offset holds zero-point and bias."""
    factor = found.x_scale * found.scales.double() / step
    offset = found.real_bias().double() / step - found.shift.double() * factor
    return (found.sums + found.shift).float(), factor.float(), offset.float()


def _torch_product(found: Sums, step: float) -> Tensor:
    return fma(*_product(found, step))


def _torch_linear(found: Sums, out: ByteGrid) -> Tensor:
    return torch.round(_torch_product(found, out.scale)) + out.zero_point


def _torch_linear_real(found: Sums) -> Tensor:
    return _torch_product(found, 1.0)


def _torch_add(operands: Operands, out: ByteGrid) -> Tensor:
    a, left, b, right = operands
    if a.numel() > ONE_PASS_FROM and a.shape == b.shape and a.dim() == 4:
        # Large sums are a oneDNN call.
        return _onednn_sum(centred(a, left) * f32(left.scale), b, right, out)
    ratio = right.scale / left.scale
    shifted = a.float() - f32(left.zero_point + right.zero_point * ratio)
    return _pass(fma(b.float(), f32(ratio), shifted), left.scale / out.scale, out)


def _torch_mul(operands: Operands, out: ByteGrid) -> Tensor:
    a, left, b, right = operands
    return _pass(centred(a, left) * centred(b, right), left.scale * right.scale / out.scale, out)


def _torch_mean(total: Tensor, pixels: int, grid: ByteGrid, out: ByteGrid) -> Tensor:
    return _pass(total, grid.scale / out.scale / pixels, out)


def _torch_average(q: Tensor, grid: ByteGrid, pool: Pool, out: ByteGrid) -> Tensor:
    return _pass(pool(centred(q, grid)), grid.scale / out.scale, out)


# The same through Inductor.


def _loop(x: Tensor, factor: float, out: ByteGrid) -> Tensor:
    return torch.round(x * f32(factor)) + out.zero_point


def _inductor_quantize(x: Tensor, grid: ByteGrid) -> Tensor:
    return _loop(x, 1.0 / grid.scale, grid)


def _inductor_linear_real(found: Sums, step: float = 1.0) -> Tensor:
    sums, factor, offset = _product(found, step)
    return sums * factor + offset


def _inductor_fused(found: Sums, q: Tensor | None, grid: ByteGrid | None, out: ByteGrid | None) -> Tensor:
    real = _inductor_linear_real(found, 1.0 if out is None else out.scale)
    if q is not None and grid is not None and out is not None:
        real = real + centred(q, grid) * f32(grid.scale / out.scale)
    return real if out is None else torch.round(real) + out.zero_point


def _inductor_sum_behind(found: Sums, q: Tensor | None, grid: ByteGrid | None, out: ByteGrid | None) -> Tensor:
    real = _onednn_real(found)
    if q is None or grid is None or out is None:
        return real if out is None else _onednn_levels(real, out)
    return _loop(real + centred(q, grid) * f32(grid.scale), 1.0 / out.scale, out)


def _inductor_linear(found: Sums, out: ByteGrid) -> Tensor:
    return torch.round(_inductor_linear_real(found, out.scale)) + out.zero_point


def _inductor_add(operands: Operands, out: ByteGrid) -> Tensor:
    a, left, b, right = operands
    ratio = right.scale / left.scale
    total = a.float() + b.float() * f32(ratio) - f32(left.zero_point + right.zero_point * ratio)
    return _loop(total, left.scale / out.scale, out)


def _inductor_mul(operands: Operands, out: ByteGrid) -> Tensor:
    a, left, b, right = operands
    return _loop(centred(a, left) * centred(b, right), left.scale * right.scale / out.scale, out)


def _inductor_mean(total: Tensor, pixels: int, grid: ByteGrid, out: ByteGrid) -> Tensor:
    return _loop(total, grid.scale / out.scale / pixels, out)


def _inductor_average(q: Tensor, grid: ByteGrid, pool: Pool, out: ByteGrid) -> Tensor:
    return _loop(pool(centred(q, grid)), grid.scale / out.scale, out)


def _joins(node: Node, weight: Tensor) -> Callable[[tuple[int, ...]], bool]:
    geometry, (left, right, top, bottom) = conv_geometry(node, weight)
    out, each, *kernel = weight.shape

    def joined(shape: tuple[int, ...]) -> bool:
        # One axis counts as the width, as in `IntegerConv`.
        count, channels, *sizes = shape
        height, width = sizes if len(sizes) == 2 else (1, *sizes)
        padded = (count, channels, height + top + bottom, width + left + right)
        return conv_joins_scales(padded, (out, each, *(kernel if len(kernel) == 2 else (1, *kernel))), geometry)

    return joined


EAGER_FORMULAS = Requantization(
    quantize=_torch_quantize,
    conv=_onednn_conv,
    conv_real=_onednn_real,
    linear=_torch_linear,
    linear_real=_torch_linear_real,
    conv_add=_onednn_conv_add,
    add=_torch_add,
    mul=_torch_mul,
    mean=_torch_mean,
    average=_torch_average,
    joins=_joins,
)
COMPILED_FORMULAS = replace(
    EAGER_FORMULAS,
    quantize=_inductor_quantize,
    linear=_inductor_linear,
    linear_real=_inductor_linear_real,
    add=_inductor_add,
    mul=_inductor_mul,
    mean=_inductor_mean,
    average=_inductor_average,
)
FORMS: dict[str, LayerFormula] = {
    "rows": _inductor_fused,
    "shifted": _inductor_fused,
    "sum behind": _inductor_sum_behind,
}
"""How a compiled convolution is told (`IntegerConv.told`) -> its formula."""
