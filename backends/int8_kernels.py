"""Integer kernels of PyTorch's CPU build, and what takes their place where the CPU lacks the instruction.

Only functions that stay: `torch.ops.onednn.qconv*`, `qlinear*` and `torch._int_mm`, on plain uint8 and int8 tensors.
Weights are packed on first use, and the packed form lives as long as the int8 tensor it was made from.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxquant.core.errors import LoweringError
from fxquant.core.spec import QuantSpec

UINT8_MAX = 255

ROUNDER = 12582912.0
"""1.5 x 2^23: float32 numbers of this size are whole, so adding it rounds half to even in one pass."""


ONE_PASS_FROM = 30_000
"""Elements from which a oneDNN call beats five passes of ATen ops over the same memory (measured, one thread)."""


@dataclass(frozen=True)
class Grid:
    """The uint8 values of one edge: real value `(q - zero_point) * scale`, q within `[low, high]`.

    Args:
        scale: step in real units, above 0.
        zero_point: the integer that stands for 0.0.
        low: smallest integer, 0 or more.
        high: largest integer, 255 or less.

    Raises:
        LoweringError: a scale that is not above 0, or integers outside uint8.
    """

    scale: float
    zero_point: int
    low: int
    high: int

    def __post_init__(self) -> None:
        if not self.scale > 0.0:
            raise LoweringError(f"an activation scale of {self.scale} cannot be lowered; scales are above 0")
        if not (0 <= self.low <= self.high <= UINT8_MAX and 0 <= self.zero_point <= UINT8_MAX):
            raise LoweringError(f"the grid [{self.low}, {self.high}] around {self.zero_point} does not fit uint8")

    @staticmethod
    def of(spec: QuantSpec, scale: Tensor, zero_point: Tensor) -> Grid:
        """Return the grid of a per-tensor quantizer; a signed one is shifted up to start at 0."""
        shift = -spec.qmin
        return Grid(float(scale), int(zero_point) + shift, 0, spec.qmax + shift)

    def clipped(self, low: float, high: float) -> Grid:
        """Return the grid behind a clip of real values to `[low, high]`: the same integers, fewer of them."""
        bottom = self.low if low == -torch.inf else round(low / self.scale) + self.zero_point
        top = self.high if high == torch.inf else round(high / self.scale) + self.zero_point
        first = min(max(self.low, bottom), self.high)
        return Grid(self.scale, self.zero_point, first, max(min(self.high, top), first))

    @property
    def saturates(self) -> bool:
        """Whether the bounds are those of uint8 itself, so that the conversion clamps by itself."""
        return self.low == 0 and self.high == UINT8_MAX


@dataclass(frozen=True)
class ConvGeometry:
    """Stride, padding and dilation (height, width), and groups, of a 2-d convolution."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Stride, padding and dilation, in the order of ATen's arguments."""
        return self.stride, self.padding, self.dilation

    def sees_only_padding(self, weight: Tensor) -> bool:
        """Whether the padding is as wide as the filter of a weight `(O, C, h, w)`, so that it can fill a window."""
        extents = ((k - 1) * d + 1 for k, d in zip(weight.shape[2:], self.dilation, strict=True))
        return any(p >= extent for p, extent in zip(self.padding, extents, strict=True))


def quantize_u8(x: Tensor, grid: Grid) -> Tensor:
    """Return `clamp(round(x / scale) + zero_point, low, high)` as uint8, half to even, of the shape of x."""
    return round_to_u8(x.float(), 1.0 / grid.scale, grid)


def round_to_u8(x: Tensor, factor: float, grid: Grid) -> Tensor:
    """Return `clamp(round(x * factor) + zero_point, low, high)` as uint8, half to even; x is float32."""
    if torch.compiler.is_compiling():
        # Inductor fuses these into one loop; eager execution would pass over memory five times.
        return torch.clamp(torch.round(x * factor) + grid.zero_point, grid.low, grid.high).to(torch.uint8)
    # Ties go to even numbers, and an odd offset would turn those into odd ones: it is added after rounding.
    odd = grid.zero_point % 2
    centre = ROUNDER + (grid.zero_point - odd)
    moved = torch.add(scalar(centre), x, alpha=factor)
    moved.clamp_(ROUNDER + grid.low - odd, ROUNDER + grid.high - odd)
    # The last byte of such a float is the whole number itself.
    whole = moved.view(torch.int32).to(torch.uint8)
    return whole.add_(1) if odd else whole


@cache
def scalar(value: float) -> Tensor:
    """Return a float32 tensor of shape (), made once: making one costs as much as a small op."""
    return torch.tensor(value)


def dequantize_u8(q: Tensor, grid: Grid) -> Tensor:
    """Return `(q - zero_point) * scale` as float32, of the shape of q."""
    if torch.compiler.is_compiling():
        return (q.to(torch.float32) - grid.zero_point) * grid.scale
    return q.to(torch.float32).sub_(grid.zero_point).mul_(grid.scale)


@cache
def conv_kernel_is_exact() -> bool:
    """Whether oneDNN's integer convolution is here and accumulates without saturating.

    CPUs before VNNI add two 8-bit products in 16 bits and overflow on the extremes, which this tries.
    """
    x = torch.full((1, 64, 3, 3), UINT8_MAX, dtype=torch.uint8)
    weight = torch.full((16, 64, 3, 3), -128, dtype=torch.int8)
    plain = ConvGeometry((1, 1), (0, 0), (1, 1), 1)
    try:
        found = _onednn_conv(x, weight, torch.ones(16), None, Grid(1.0, 0, 0, UINT8_MAX), plain, None)
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


def _packed_conv(weight: Tensor, scales: Tensor, grid: Grid, geometry: ConvGeometry, shape: Sequence[int]) -> Tensor:
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
    if "linear" not in uses:
        uses["linear"] = torch.ops.onednn.qlinear_prepack(weight, list(shape))
    return uses["linear"]


def _onednn_conv(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    grid: Grid,
    geometry: ConvGeometry,
    out: Grid | None,
) -> Tensor:
    packed = _packed_conv(weight, scales, grid, geometry, x.shape)
    scale, zero_point, dtype = (1.0, 0, torch.float32) if out is None else (out.scale, out.zero_point, torch.uint8)
    post, bounds = _bounds(out)
    made: Tensor = torch.ops.onednn.qconv2d_pointwise(
        *(x, grid.scale, grid.zero_point, packed, scales, _no_zero_points(len(scales)), bias),
        *(*geometry.sizes, geometry.groups, scale, zero_point, dtype, post, bounds, ""),
    )
    return made


def _bounds(out: Grid | None) -> tuple[str, list[float]]:
    """Return the kernel's last step: a grid narrower than uint8 is a clip in real units before the rounding."""
    if out is None or out.saturates:
        return "none", []
    return "hardtanh", [(edge - out.zero_point) * out.scale for edge in (out.low, out.high)]


@cache
def _no_zero_points(channels: int) -> Tensor:
    return torch.zeros(channels, dtype=torch.int8)


def _exact_conv(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    grid: Grid,
    geometry: ConvGeometry,
    out: Grid | None,
) -> Tensor:
    # Sums of 8-bit products stay far below 2^53: float64 holds them exactly on any CPU.
    centred = x.double() - grid.zero_point
    sums = F.conv2d(centred, weight.double(), None, *geometry.sizes, geometry.groups)
    real = sums.float() * (grid.scale * scales).view(-1, 1, 1)
    real = real if bias is None else real + bias.view(-1, 1, 1)
    made = real if out is None else quantize_u8(real, out)
    return made.contiguous(memory_format=torch.channels_last)


def conv2d(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    grid: Grid,
    geometry: ConvGeometry,
    out: Grid | None,
    exact: bool = False,
) -> Tensor:
    """Return a convolution of uint8 with int8, accumulated in int32, padded with the zero-point.

    `y = round((s_x s_w sum((x - z_x) w) + bias) / s_y) + z_y`, clamped to the grid; without `out`, the real value
    before the division.

    Args:
        x: uint8 `(N, C, H, W)`.
        weight: int8 `(O, C / groups, h, w)`; must not change, its packed form is kept as long as it lives.
        scales: float32 `(O,)`, of the weight.
        bias: float32 `(O,)` in real units, or None.
        grid: of x.
        geometry: of the convolution.
        out: grid of the result, or None for float32.
        exact: take the float64 route, for CPUs where `conv_kernel_is_exact` is False.

    Returns:
        uint8 or float32 `(N, O, H', W')` in channels-last order.
    """
    if geometry.sees_only_padding(weight):
        # oneDNN 3.12 reads outside of x for windows that lie in the padding altogether: no window may.
        (top, left), plain = geometry.padding, replace(geometry, padding=(0, 0))
        x, geometry = F.pad(x, (left, left, top, top), value=grid.zero_point), plain
    kernel = _exact_conv if exact else _onednn_conv
    return kernel(x, weight, scales, bias, grid, geometry, out)


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


def onednn_add(a: Tensor, b: Tensor, left: Grid, right: Grid, out: Grid) -> Tensor:
    """Return the sum of two uint8 tensors on a third grid in one pass over memory.

    oneDNN has no integer sum of its own, but a 1x1 depthwise convolution with weight 1 adds one to what is there.

    Args:
        a: uint8 `(N, C, H, W)`.
        b: uint8 of the same shape in channels-last order.
        left: grid of a.
        right: grid of b.
        out: grid of the result.
    """
    weight, scales = _identity(a.shape[1])
    geometry = ConvGeometry((1, 1), (0, 0), (1, 1), a.shape[1])
    packed = _packed_conv(weight, scales, left, geometry, a.shape)
    made: Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
        # The kernel writes over what it adds to; a copy costs a twentieth of it.
        *(a, left.scale, left.zero_point, packed, scales, _no_zero_points(len(scales)), b.clone(), None),
        *((1, 1), (0, 0), (1, 1), a.shape[1], out.scale, out.zero_point, torch.uint8),
        *(right.scale, right.zero_point, "sum", 1.0, "none", [], ""),
    )
    # This form of the kernel takes no clip; on one byte per element it is cheap afterwards.
    return made if out.saturates else made.clamp_(out.low, out.high)


@cache
def _identity(channels: int) -> tuple[Tensor, Tensor]:
    return torch.ones(channels, 1, 1, 1, dtype=torch.int8), torch.ones(channels)


def onednn_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
    """Return `s_x s_w ((x - z_x) @ weight.T) + bias` as float32 `(M, N)` through oneDNN's packed matrix product.

    Args:
        x: uint8 `(M, K)`.
        weight: int8 `(N, K)`; must not change, its packed form is kept as long as it lives.
        scales: float32 `(N,)`, of the weight.
        bias: float32 `(N,)` in real units, or None.
        grid: of x.
    """
    made: Tensor = torch.ops.onednn.qlinear_pointwise(
        *(x, grid.scale, grid.zero_point, _packed_linear(weight, x.shape), scales, _no_zero_points(len(scales))),
        *(bias, 1.0, 0, torch.float32, "none", [], ""),
    )
    return made
