"""Integer kernels of PyTorch's CPU build, and what takes their place where the CPU lacks the instruction.

Only functions that stay: `torch.ops.onednn.qconv*`, `qlinear*` and `torch._int_mm`, on plain uint8 and int8 tensors.
Weights are packed on first use, and the packed form lives as long as the int8 tensor it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isinf

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxquant.backends.affine import UINT8_MAX, ByteGrid, dequantize_u8, quantize_u8
from fxquant.backends.int8.geometry import ConvGeometry, ConvGrids
from fxquant.core.errors import LoweringError

EXACT_KERNEL = "float64 on integers"
"""What runs where the CPU lacks the instruction."""

ONE_PASS_FROM = 30_000
"""Elements from which a oneDNN call beats five passes of ATen ops over the same memory (measured, one thread)."""


@cache
def conv_kernel_is_exact() -> bool:
    """Whether oneDNN's integer convolution is here and accumulates without saturating.

    CPUs before VNNI add two 8-bit products in 16 bits and overflow on the extremes, which this tries.
    """
    x = torch.full((1, 64, 3, 3), UINT8_MAX, dtype=torch.uint8)
    weight = torch.full((16, 64, 3, 3), -128, dtype=torch.int8)
    plain, grids = ConvGeometry((1, 1), (0, 0), (1, 1), 1), ConvGrids(ByteGrid(1.0, 0, 0, UINT8_MAX), None)
    try:
        found = prepared_conv(weight, torch.ones(16), None, plain, grids, x.shape)(x, None)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((found == -128.0 * UINT8_MAX * 64 * 9).all())


@cache
def matmul_kernel_is_exact() -> bool:
    """Whether `torch._int_mm` multiplies uint8 by int8 here without saturating."""
    left = torch.full((17, 64), UINT8_MAX, dtype=torch.uint8)
    right = torch.full((64, 16), -128, dtype=torch.int8)
    try:
        found = torch._int_mm(left, right)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((found == -128 * UINT8_MAX * 64).all())


_PACKED: MutableMapping[Tensor, dict[object, Tensor]] = WeakTensorKeyDictionary()
"""int8 weight -> packed weights by use; an entry lives as long as the weight it was made from."""

ConvCall = Callable[[Tensor, Tensor | None], Tensor]
"""Takes the input, and the addend if there is one: in channels-last order, and the call may overwrite it."""


def packed_conv(weight: Tensor, scales: Tensor, grid: ByteGrid, geometry: ConvGeometry, shape: Sequence[int]) -> Tensor:
    """Return a weight in the order oneDNN wants for images of a shape; it is packed once and kept while it lives."""
    uses = _PACKED.setdefault(weight, {})
    packed = uses.get(geometry)
    if packed is None:
        packed = torch.ops.onednn.qconv_prepack(
            weight, scales, grid.scale, grid.zero_point, *geometry.sizes, geometry.groups, list(shape)
        )
        uses[geometry] = packed
    return packed


def _packed_linear(weight: Tensor, shape: Sequence[int]) -> Tensor:
    uses = _PACKED.setdefault(weight, {})
    if "matrix" not in uses:
        uses["matrix"] = torch.ops.onednn.qlinear_prepack(weight, list(shape))
    return uses["matrix"]


def prepared_conv(
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    grids: ConvGrids,
    shape: Sequence[int],
    exact: bool = False,
) -> ConvCall:
    """Return the convolution of `conv2d` with all that can be done once already done.

    Args:
        weight: int8 `(O, C / groups, h, w)`; must not change, its packed form is kept as long as it lives.
        scales: float32 `(O,)`, of the weight.
        bias: float32 `(O,)` in real units, or None.
        geometry: of the convolution.
        grids: of what it reads and writes.
        shape: of an input, which the packed form is chosen for; inputs of other sizes run too.
        exact: take the float64 route, for CPUs where `conv_kernel_is_exact` is False.
    """
    if exact:
        return lambda x, other: _exact_conv(x, other, weight, scales, bias, geometry, grids)
    height, width = geometry.least_image(weight)

    def small(x: Tensor, other: Tensor | None) -> Tensor:
        """Compute the same from an image that holds its padding, and only the columns that are read."""
        (top, left), plain = geometry.padding, replace(geometry, padding=(0, 0))
        x = pad_u8(x, (left, left, top, top), grids.source.zero_point)
        if not plain.reads(weight, x.shape):
            # One window per row: its stride does not matter.
            x = x[..., : plain.extents(weight)[1]].contiguous(memory_format=torch.channels_last)
            plain = replace(plain, stride=(plain.stride[0], 1))
        return prepared_conv(weight, scales, bias, plain, grids, x.shape)(x, other)

    if isinf(height) or isinf(width):
        return small
    packed = packed_conv(weight, scales, grids.source, geometry, shape)
    call = onednn_conv(packed, scales, _no_zero_points(len(scales)), bias, geometry, grids)
    if max(height, width) <= 1:
        return call
    return lambda x, other: (call if x.shape[2] >= height and x.shape[3] >= width else small)(x, other)


def onednn_conv(
    packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, geometry: ConvGeometry, grids: ConvGrids
) -> ConvCall:
    """Return oneDNN's convolution with packed weights; `zeros` are the weight's zero-points, int8 `(O,)`."""
    source, out, addend = grids.source, grids.out, grids.addend
    before = (source.scale, source.zero_point, packed, scales, zeros)
    # Lists, as the operator takes them: converting tuples costs a microsecond each, every call.
    sizes = (*(list(size) for size in geometry.sizes), geometry.groups)
    scale, zero_point, dtype = (1.0, 0, torch.float32) if out is None else (out.scale, out.zero_point, torch.uint8)
    if addend is None:
        post, bounds = _bounds(out)
        plain = torch.ops.onednn.qconv2d_pointwise.default
        tail = (bias, *sizes, scale, zero_point, dtype, post, bounds, "")
        return lambda x, _: plain(x, *before, *tail)
    assert out is not None
    binary = torch.ops.onednn.qconv2d_pointwise.binary
    # This form of the kernel takes a ReLU and no other clip; on one byte per element that is cheap afterwards.
    clamped = not (out.saturates or (out.low == out.zero_point and out.high == UINT8_MAX))
    post = "none" if out.saturates else "relu" if out.low == out.zero_point else "none"
    after = (
        bias,
        *sizes,
        scale,
        zero_point,
        dtype,
        addend.scale,
        addend.zero_point,
        "sum",
        1.0,
        post,
        list[float](),
        "",
    )

    def sum_into(x: Tensor, other: Tensor | None) -> Tensor:
        made: Tensor = binary(x, *before, other, *after)
        return made.clamp_(out.low, out.high) if clamped else made

    return sum_into


def _bounds(out: ByteGrid | None) -> tuple[str, list[float]]:
    """Return the kernel's last step: a grid narrower than uint8 is a clip in real units before the rounding."""
    if out is None or out.saturates:
        return "none", []
    return "hardtanh", [(edge - out.zero_point) * out.scale for edge in (out.low, out.high)]


@cache
def _no_zero_points(channels: int) -> Tensor:
    return torch.zeros(channels, dtype=torch.int8)


def _exact_conv(
    x: Tensor,
    other: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    grids: ConvGrids,
) -> Tensor:
    # Sums of 8-bit products stay far below 2^53: float64 holds them exactly on any CPU.
    centred = x.double() - grids.source.zero_point
    sums = F.conv2d(centred, weight.double(), None, *geometry.sizes, geometry.groups)
    real = sums.float() * grids.source.scale * scales.view(-1, 1, 1)
    real = real if bias is None else real + bias.view(-1, 1, 1)
    if other is not None and grids.addend is not None:
        real = real + dequantize_u8(other, grids.addend)
    made = real if grids.out is None else quantize_u8(real, grids.out)
    return made.contiguous(memory_format=torch.channels_last)


def pad_u8(x: Tensor, pads: Sequence[int], value: int) -> Tensor:
    """Return uint8 `(N, C, H, W)` with `value` added at left, right, top and bottom, in channels-last order."""
    left, right, top, bottom = pads
    count, channels, height, width = x.shape
    shape = (count, channels, height + top + bottom, width + left + right)
    made = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    # Only the border is filled: a pass over the whole image first would cost as much as the copy.
    for border in (made[:, :, :top], made[:, :, top + height :], made[..., :left], made[..., left + width :]):
        border.fill_(value)
    made[:, :, top : top + height, left : left + width] = x
    return made


def conv2d(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    grids: ConvGrids,
    other: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """Return a convolution of uint8 with int8, accumulated in int32, padded with the zero-point.

    `y = round((s_x s_w sum((x - z_x) w) + bias + s_o (other - z_o)) / s_y) + z_y`, clamped to the grid; without an
    output grid, the real value before the division.

    Args:
        x: uint8 `(N, C, H, W)`.
        weight: int8 `(O, C / groups, h, w)`; must not change, its packed form is kept as long as it lives.
        scales: float32 `(O,)`, of the weight.
        bias: float32 `(O,)` in real units, or None.
        geometry: of the convolution.
        grids: of what it reads and writes.
        other: uint8 `(N, O, H', W')` where `grids` has an addend; it is not changed.
        exact: take the float64 route, for CPUs where `conv_kernel_is_exact` is False.

    Returns:
        uint8 or float32 `(N, O, H', W')` in channels-last order.
    """
    call = prepared_conv(weight, scales, bias, geometry, grids, x.shape, exact)
    return call(x, None if other is None else other.clone(memory_format=torch.channels_last))


def matmul(x: Tensor, weight: Tensor, exact: bool = False) -> Tensor:
    """Return `x @ weight.T` of uint8 `(M, K)` and int8 `(N, K)` as exact integers `(M, N)`, int32 or float64.

    `exact` is for CPUs where `matmul_kernel_is_exact` is False.
    """
    if exact:
        return x.double() @ weight.double().t()
    if x.shape[1] == 1:
        # `_int_mm` misreads a single column and, below, a single row whose stride says nothing about its length.
        return x.to(torch.int32) * weight.t().to(torch.int32)
    if x.shape[0] == 1:
        row = torch.cat([x, x]) if torch.compiler.is_compiling() else x.reshape(-1).unsqueeze(0)
        return torch._int_mm(row, weight.t())[:1]
    return torch._int_mm(x.contiguous(), weight.t())


def as_float(sums: Tensor) -> Tensor:
    """Return exact sums as float32; int32 sums are given up, their memory is used."""
    if sums.dtype != torch.int32 or torch.compiler.is_compiling():
        return sums.float()
    # Fresh memory of this size costs more, in page faults, than the conversion.
    return sums.view(torch.float32).copy_(sums)


def onednn_add(a: Tensor, b: Tensor, left: ByteGrid, right: ByteGrid, out: ByteGrid) -> Tensor:
    """Return the sum of two uint8 tensors on a third grid in one pass over memory.

    oneDNN has no integer sum, but a 1x1 depthwise convolution with weight 1 adds one to what is there.

    Args:
        a: uint8 `(N, C, H, W)`.
        b: uint8 of the same shape in channels-last order.
        left: grid of a.
        right: grid of b.
        out: grid of the result.
    """
    weight, scales = _identity(a.shape[1])
    geometry, grids = ConvGeometry((1, 1), (0, 0), (1, 1), a.shape[1]), ConvGrids(left, out, right)
    return conv2d(a, weight, scales, None, geometry, grids, b)


@cache
def _identity(channels: int) -> tuple[Tensor, Tensor]:
    return torch.ones(channels, 1, 1, 1, dtype=torch.int8), torch.ones(channels)


@dataclass(frozen=True)
class LinearEnd:
    """What follows the sums of a linear layer within the same call.

    Args:
        out: grid of the output, None for float32.
        activation: "none", "gelu" (by the error function) or "gelu_tanh", before the rounding.

    Raises:
        LoweringError: an activation that the kernel does not have.
    """

    out: ByteGrid | None
    activation: str = "none"

    def __post_init__(self) -> None:
        if self.activation not in _LINEAR_ENDS:
            raise LoweringError(f"no linear kernel ends in {self.activation!r}; known: {', '.join(_LINEAR_ENDS)}")


_LINEAR_ENDS = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
"""Activation -> oneDNN's name of it, and of the way it is computed."""


def prepared_linear(
    weight: Tensor, scales: Tensor, bias: Tensor | None, grid: ByteGrid, end: LinearEnd, shape: Sequence[int]
) -> Callable[[Tensor], Tensor]:
    """Return a call for `activation(s_x s_w ((x - z_x) @ weight.T) + bias)`, rounded where the output has a grid.

    oneDNN's packed matrix product: uint8 `(M, K)` in, uint8 or float32 `(M, N)` out.

    Args:
        weight: int8 `(N, K)`; must not change, its packed form is kept as long as it lives.
        scales: float32 `(N,)`, of the weight.
        bias: float32 `(N,)` in real units, or None.
        grid: of the input.
        end: what follows the sums.
        shape: of an input, which the packed form is chosen for; inputs of other sizes run too.
    """
    out = end.out
    scale, zero_point, dtype = (1.0, 0, torch.float32) if out is None else (out.scale, out.zero_point, torch.uint8)
    before = (grid.scale, grid.zero_point, _packed_linear(weight, shape), scales, _no_zero_points(len(scales)))
    post, algorithm = _LINEAR_ENDS[end.activation]
    after = (bias, scale, zero_point, dtype, post, list[float](), algorithm)
    kernel = torch.ops.onednn.qlinear_pointwise.default
    narrow = out is not None and not out.saturates

    def product(x: Tensor) -> Tensor:
        made: Tensor = kernel(x, *before, *after)
        return made.clamp_(out.low, out.high) if narrow and out is not None else made

    return product
