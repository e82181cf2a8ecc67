"""How PyTorch's integer kernels requantize, eagerly and as Inductor compiles them (oneDNN 3.12 on AVX512-VNNI).

oneDNN scales in two steps, adds a float bias, multiplies by 1 / step and adds the zero-point before it rounds; the
passes between its calls round the exact product of a float32 and a float32 factor. Inductor turns those passes into one
loop without fused products, each operation rounded to float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxquant.backends.affine import ByteGrid
from fxquant.backends.exact import LayerFormula, Operands, Pool, Sums, centred, f32, fma
from fxquant.backends.int8.kernels import ONE_PASS_FROM

Rescale = Callable[[Tensor, float, ByteGrid], Tensor]


def eager(x: Tensor, factor: float, out: ByteGrid) -> Tensor:
    """Return the levels of `factor x`, of the exact product."""
    return torch.round(x.double() * f32(factor).double()).float() + out.zero_point


def _onednn_levels(real: Tensor, out: ByteGrid) -> Tensor:
    return torch.round(real * (1.0 / f32(out.scale)) + out.zero_point)


def _onednn_sum(real: Tensor, q: Tensor, grid: ByteGrid, out: ByteGrid) -> Tensor:
    return _onednn_levels(fma(centred(q, grid), f32(grid.scale), real), out)


def _onednn_real(found: Sums) -> Tensor:
    step, sums = f32(found.x_scale), found.sums.float()
    real = sums * (step * found.scales) if found.joined else sums * step * found.scales
    return real if found.bias is None else real + found.real_bias()


def onednn_conv(found: Sums, q: Tensor | None, grid: ByteGrid | None, out: ByteGrid | None) -> Tensor:
    """Return the levels, or the real values, of a convolution plus an operand."""
    real = _onednn_real(found)
    if q is not None and grid is not None and out is not None:
        return _onednn_sum(real, q, grid, out)
    return real if out is None else _onednn_levels(real, out)


def _product(found: Sums, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return an `_int_mm` product, factor and offset in units of `step`: the offset holds zero-point and bias."""
    factor = found.x_scale * found.scales.double() / step
    offset = found.real_bias().double() / step - found.shift.double() * factor
    return (found.sums + found.shift).float(), factor.float(), offset.float()


def torch_linear(found: Sums, q: Tensor | None, grid: ByteGrid | None, out: ByteGrid | None) -> Tensor:
    """Return the levels, or the real values, of a linear layer; no kernel adds an operand."""
    assert q is None
    assert grid is None
    real = fma(*_product(found, 1.0 if out is None else out.scale))
    return real if out is None else torch.round(real) + out.zero_point


def torch_add(operands: Operands, out: ByteGrid) -> Tensor:
    """Return the levels of a sum."""
    a, left, b, right = operands
    if a.numel() > ONE_PASS_FROM and a.shape == b.shape and a.dim() == 4:
        # Large sums are a oneDNN call.
        return _onednn_sum(centred(a, left) * f32(left.scale), b, right, out)
    ratio = right.scale / left.scale
    shifted = a.float() - f32(left.zero_point + right.zero_point * ratio)
    return eager(fma(b.float(), f32(ratio), shifted), left.scale / out.scale, out)


# The same through Inductor.


def inductor(x: Tensor, factor: float, out: ByteGrid) -> Tensor:
    """Return the levels of `factor x`, the product rounded to float32."""
    return torch.round(x * f32(factor)) + out.zero_point


def inductor_layer(found: Sums, q: Tensor | None, grid: ByteGrid | None, out: ByteGrid | None) -> Tensor:
    """Return the levels, or the real values, of a linear layer, or of a convolution that is written as products."""
    sums, factor, offset = _product(found, 1.0 if out is None else out.scale)
    real = sums * factor + offset
    if q is not None and grid is not None and out is not None:
        real = real + centred(q, grid) * f32(grid.scale / out.scale)
    return real if out is None else torch.round(real) + out.zero_point


def _inductor_sum_behind(found: Sums, q: Tensor | None, grid: ByteGrid | None, out: ByteGrid | None) -> Tensor:
    real = _onednn_real(found)
    if q is None or grid is None or out is None:
        return real if out is None else _onednn_levels(real, out)
    return inductor(real + centred(q, grid) * f32(grid.scale), 1.0 / out.scale, out)


def inductor_add(operands: Operands, out: ByteGrid) -> Tensor:
    """Return the levels of a sum."""
    a, left, b, right = operands
    ratio = right.scale / left.scale
    total = a.float() + b.float() * f32(ratio) - f32(left.zero_point + right.zero_point * ratio)
    return inductor(total, left.scale / out.scale, out)


# One pass over its operands each, with `eager` or `inductor` to rescale.


def quantize(rescale: Rescale, x: Tensor, grid: ByteGrid) -> Tensor:
    """Return a float32 tensor on a grid."""
    return rescale(x, 1.0 / grid.scale, grid)


def multiply(rescale: Rescale, operands: Operands, out: ByteGrid) -> Tensor:
    """Return the levels of a product."""
    a, left, b, right = operands
    return rescale(centred(a, left) * centred(b, right), left.scale * right.scale / out.scale, out)


def mean(rescale: Rescale, total: Tensor, pixels: int, grid: ByteGrid, out: ByteGrid) -> Tensor:
    """Return the levels of a mean over images."""
    return rescale(total, grid.scale / out.scale / pixels, out)


def average(rescale: Rescale, q: Tensor, grid: ByteGrid, pool: Pool, out: ByteGrid) -> Tensor:
    """Return the levels of a mean over windows."""
    return rescale(pool(centred(q, grid)), grid.scale / out.scale, out)


FORMS: dict[str, LayerFormula] = {"rows": inductor_layer, "shifted": inductor_layer, "sum behind": _inductor_sum_behind}
"""Form of a compiled convolution (`IntegerConv.traced_as`) -> its formula."""
