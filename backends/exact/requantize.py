"""How a runtime goes back from exact sums of integers to 8 bits: its own formula, in its own order of operations.

Integer accumulation is the same everywhere; what differs is the last step in float32: which scales are multiplied
first, whether the zero-point is added before or after rounding, whether a product and a sum are fused. Each formula
was found by trying: single operators with exhaustive inputs, or scales that put thousands of sums next to a tie
(onnxruntime 1.31, oneDNN 3.12 on AVX512-VNNI); `tests/backends/test_requantize.py` repeats the trial.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.backends.int8 import ONE_PASS_FROM, ByteGrid, ConvGeometry, conv_joins_scales
from fxquant.core.errors import OptionError


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
        return torch.zeros(()) if self.bias is None else self.bias.float() * (_f32(self.x_scale) * self.scales)


Operands = tuple[Tensor, ByteGrid, Tensor, ByteGrid]
"""Two uint8 tensors, each with its grid."""

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
        joins: shapes of input and weight, geometry -> `Sums.joined` of a convolution; None where it is never so.
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
    joins: Callable[[tuple[int, ...], tuple[int, ...], ConvGeometry], bool] | None = None


def _f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return `a b + c` of float32 tensors, rounded once: products of two are exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def _centred(q: Tensor, grid: ByteGrid) -> Tensor:
    return q.float() - grid.zero_point


# ONNX Runtime: everything into one float32 factor, rounding half to even, then the zero-point.


def _ort_quantize(x: Tensor, grid: ByteGrid) -> Tensor:
    return torch.round(x / _f32(grid.scale)) + grid.zero_point


def _ort_total(found: Sums) -> Tensor:
    # The bias is part of the int32 accumulator.
    return (found.sums if found.bias is None else found.sums + found.bias).float()


def _ort_weighted(found: Sums, out: ByteGrid) -> Tensor:
    factor = (_f32(found.x_scale) * found.scales) / _f32(out.scale)
    return torch.round(_ort_total(found) * factor) + out.zero_point


def _ort_real(found: Sums) -> Tensor:
    return _ort_total(found) * (_f32(found.x_scale) * found.scales)


def _ort_add(operands: Operands, out: ByteGrid) -> Tensor:
    a, left, b, right = operands
    step = _f32(out.scale)
    one, other = _f32(left.scale) / step, _f32(right.scale) / step
    fixed = out.zero_point - _fma(one, _f32(left.zero_point), other * right.zero_point)
    return torch.round(_fma(a.float(), one, _fma(b.float(), other, fixed)))


def _ort_mul(operands: Operands, out: ByteGrid) -> Tensor:
    a, left, b, right = operands
    factor = _f32(left.scale) * _f32(right.scale) / _f32(out.scale)
    return torch.round(_centred(a, left) * _centred(b, right) * factor + out.zero_point)


def _ort_mean(total: Tensor, pixels: int, grid: ByteGrid, out: ByteGrid) -> Tensor:
    return torch.round(total * (_f32(grid.scale) / (_f32(out.scale) * pixels))) + out.zero_point


def _ort_average(q: Tensor, grid: ByteGrid, pool: Pool, out: ByteGrid) -> Tensor:
    return torch.round(pool(_centred(q, grid) * _f32(grid.scale)) / _f32(out.scale) + out.zero_point)


# PyTorch: oneDNN scales in two steps, adds a float bias, multiplies by 1 / step and adds the zero-point before it
# rounds; the passes between its calls round the exact product of a float32 and a float32 factor.


def _pass(x: Tensor, factor: float, out: ByteGrid) -> Tensor:
    return torch.round(x.double() * _f32(factor).double()).float() + out.zero_point


def _torch_quantize(x: Tensor, grid: ByteGrid) -> Tensor:
    return _pass(x, 1.0 / grid.scale, grid)


def _onednn_levels(real: Tensor, out: ByteGrid) -> Tensor:
    return torch.round(real * (1.0 / _f32(out.scale)) + out.zero_point)


def _onednn_sum(real: Tensor, q: Tensor, grid: ByteGrid, out: ByteGrid) -> Tensor:
    return _onednn_levels(_fma(_centred(q, grid), _f32(grid.scale), real), out)


def _onednn_real(found: Sums) -> Tensor:
    step, sums = _f32(found.x_scale), found.sums.float()
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
    return _fma(*_product(found, step))


def _torch_linear(found: Sums, out: ByteGrid) -> Tensor:
    return torch.round(_torch_product(found, out.scale)) + out.zero_point


def _torch_linear_real(found: Sums) -> Tensor:
    return _torch_product(found, 1.0)


def _torch_add(operands: Operands, out: ByteGrid) -> Tensor:
    a, left, b, right = operands
    if a.numel() > ONE_PASS_FROM and a.shape == b.shape and a.dim() == 4:
        # Large sums are a oneDNN call.
        return _onednn_sum(_centred(a, left) * _f32(left.scale), b, right, out)
    ratio = right.scale / left.scale
    shifted = a.float() - _f32(left.zero_point + right.zero_point * ratio)
    return _pass(_fma(b.float(), _f32(ratio), shifted), left.scale / out.scale, out)


def _torch_mul(operands: Operands, out: ByteGrid) -> Tensor:
    a, left, b, right = operands
    return _pass(_centred(a, left) * _centred(b, right), left.scale * right.scale / out.scale, out)


def _torch_mean(total: Tensor, pixels: int, grid: ByteGrid, out: ByteGrid) -> Tensor:
    return _pass(total, grid.scale / out.scale / pixels, out)


def _torch_average(q: Tensor, grid: ByteGrid, pool: Pool, out: ByteGrid) -> Tensor:
    return _pass(pool(_centred(q, grid)), grid.scale / out.scale, out)


# The same through Inductor: the passes become one loop without fused products, each operation rounded to float32.


def _loop(x: Tensor, factor: float, out: ByteGrid) -> Tensor:
    return torch.round(x * _f32(factor)) + out.zero_point


def _inductor_quantize(x: Tensor, grid: ByteGrid) -> Tensor:
    return _loop(x, 1.0 / grid.scale, grid)


def _inductor_linear_real(found: Sums, step: float = 1.0) -> Tensor:
    sums, factor, offset = _product(found, step)
    return sums * factor + offset


def _inductor_fused(found: Sums, q: Tensor | None, grid: ByteGrid | None, out: ByteGrid | None) -> Tensor:
    real = _inductor_linear_real(found, 1.0 if out is None else out.scale)
    if q is not None and grid is not None and out is not None:
        real = real + _centred(q, grid) * _f32(grid.scale / out.scale)
    return real if out is None else torch.round(real) + out.zero_point


def _inductor_sum_behind(found: Sums, q: Tensor | None, grid: ByteGrid | None, out: ByteGrid | None) -> Tensor:
    real = _onednn_real(found)
    if q is None or grid is None or out is None:
        return real if out is None else _onednn_levels(real, out)
    return _loop(real + _centred(q, grid) * _f32(grid.scale), 1.0 / out.scale, out)


def _inductor_linear(found: Sums, out: ByteGrid) -> Tensor:
    return torch.round(_inductor_linear_real(found, out.scale)) + out.zero_point


def _inductor_add(operands: Operands, out: ByteGrid) -> Tensor:
    a, left, b, right = operands
    ratio = right.scale / left.scale
    total = a.float() + b.float() * _f32(ratio) - _f32(left.zero_point + right.zero_point * ratio)
    return _loop(total, left.scale / out.scale, out)


def _inductor_mul(operands: Operands, out: ByteGrid) -> Tensor:
    a, left, b, right = operands
    return _loop(_centred(a, left) * _centred(b, right), left.scale * right.scale / out.scale, out)


def _inductor_mean(total: Tensor, pixels: int, grid: ByteGrid, out: ByteGrid) -> Tensor:
    return _loop(total, grid.scale / out.scale / pixels, out)


def _inductor_average(q: Tensor, grid: ByteGrid, pool: Pool, out: ByteGrid) -> Tensor:
    return _loop(pool(_centred(q, grid)), grid.scale / out.scale, out)


_EAGER = Requantization(
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
    joins=conv_joins_scales,
)

REQUANTIZATIONS: dict[str, Requantization] = {
    "onnxruntime": Requantization(
        quantize=_ort_quantize,
        conv=_ort_weighted,
        conv_real=_ort_real,
        linear=_ort_weighted,
        linear_real=_ort_real,
        conv_add=None,
        add=_ort_add,
        mul=_ort_mul,
        mean=_ort_mean,
        average=_ort_average,
    ),
    "fx_int8": _EAGER,
    "compiled": replace(
        _EAGER,
        quantize=_inductor_quantize,
        linear=_inductor_linear,
        linear_real=_inductor_linear_real,
        add=_inductor_add,
        mul=_inductor_mul,
        mean=_inductor_mean,
        average=_inductor_average,
    ),
}
"""Runtime -> its formulas."""


FORMS: dict[str, Callable[[Sums, Tensor | None, ByteGrid | None, ByteGrid | None], Tensor]] = {
    "rows": _inductor_fused,
    "shifted": _inductor_fused,
    "sum behind": _inductor_sum_behind,
}
"""How a compiled convolution is told (`IntegerConv.told`) -> its formula: sums, addend, its grid, output grid."""


def requantization(runtime: str) -> Requantization:
    """Return the formulas of a runtime.

    Raises:
        OptionError: there are none for it.
    """
    if runtime not in REQUANTIZATIONS:
        raise OptionError(f"no requantization formula is known for {runtime!r}; known: {', '.join(REQUANTIZATIONS)}")
    return REQUANTIZATIONS[runtime]
