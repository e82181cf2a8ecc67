"""The integer convolution of a lowered graph, in the form that is fastest for its shape and for who executes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends.affine import ByteGrid, dequantize_u8, quantize_u8, round_to_u8
from fxquant.backends.int8 import kernels
from fxquant.backends.int8.custom_ops import conv2d_op, pad_op
from fxquant.backends.int8.first_use import OnFirstUse
from fxquant.backends.int8.geometry import ConvGeometry, ConvGrids
from fxquant.backends.int8.kernels import ConvCall
from fxquant.backends.int8.packed_layer import PackedLayer

CALL = 1e-4
"""Seconds that one oneDNN call costs beyond its arithmetic, and code written by a compiler does not (measured)."""

PASS_PER_ELEMENT = 4.5e-10
"""Seconds per output element that rescaling int32 sums in a separate pass takes longer than in place (measured)."""

PASS_PER_TAP = 0.8e-10
"""Seconds per output element and filter tap that a depthwise filter takes longer in fused float code (measured)."""


def traced_form(weight: Tensor, geometry: ConvGeometry, outputs: int) -> str:
    """Return the form in which a compiler traces a convolution: "call", "rows" or "shifted".

    A call of oneDNN has a fixed price; a filter of one pixel is a matrix product over rows of pixels, and a depthwise
    filter is a sum of shifted images, both of which a compiler fuses with the rounding behind them.

    Args:
        weight: int8 `(O, C / groups, h, w)`.
        geometry: of the convolution.
        outputs: elements of the output for the batch that kernels are chosen for.
    """
    taps = weight.shape[2] * weight.shape[3]
    if taps == 1 and geometry.groups == 1 and geometry.padding == (0, 0):
        return "rows" if outputs * PASS_PER_ELEMENT < CALL else "call"
    # With padding a compiler tests every pixel it loads, and no longer loads many at once.
    depthwise = geometry.groups == weight.shape[0] and weight.shape[1] == 1 and geometry.padding == (0, 0)
    return "shifted" if depthwise and outputs * taps * PASS_PER_TAP < CALL else "call"


class IntegerConv(PackedLayer):
    """A convolution over one or two axes: uint8 in, uint8 or float32 out.

    Args:
        weight: int8 `(O, C / groups, h, w)`, or without h for one axis.
        scales: float32 `(O,)`.
        bias: float32 `(O,)` or None.
        geometry: of the 2-d convolution; one axis counts as the width.
        grids: of what it reads and writes; with an addend, `forward` takes a second operand.
        before: zeros to add at left, right, top, bottom, beyond what `geometry` pads on both sides alike.
        form: in which a compiler traces it, see `traced_form`.
        shape: of an input, which weights are packed for beforehand; without, a compiler calls a slower op.
        exact: take the float64 route whatever the CPU can do.
    """

    scales: Tensor
    bias: Tensor | None
    factors: Tensor
    offsets: Tensor
    taps: Tensor
    zeros: Tensor

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        geometry: ConvGeometry,
        grids: ConvGrids,
        before: tuple[int, int, int, int] = (0, 0, 0, 0),
        form: str = "call",
        shape: Sequence[int] | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.one_axis = weight.dim() == 3
        self.keep(weight.unsqueeze(2) if self.one_axis else weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.geometry, self.grids, self.before = geometry, grids, before
        self.exact = exact or not kernels.conv_kernel_is_exact()
        self.traced = "call" if self.exact or not kernels.matmul_kernel_is_exact() else form
        #: whether the second operand is not read after this, so that the sum may take its place in memory
        self.may_overwrite = False
        self._call = OnFirstUse[ConvCall]()
        self.shape = None if shape is None else tuple(shape)
        self._packed = _Packed()
        self.prepare()

    def prepare(self) -> None:
        """Bring the weight into the order in which compiled code reads it."""
        if self.traced != "call":
            self._rescaling(1.0 if self.grids.out is None else self.grids.out.scale)
        if self.shape is not None and self._is_packed():
            given = (self.weight, self.scales, self.grids.source, self.geometry, self.shape)
            self._packed.weight = kernels.packed_conv(*given)
            self.register_buffer("zeros", torch.zeros(len(self.scales), dtype=torch.int8), persistent=False)
        if self.traced == "shifted":
            # One row of channels per tap: a compiler loads such rows in one instruction.
            taps = self.weight.flatten(1).t().to(torch.float32).contiguous()
            self.register_buffer("taps", taps, persistent=False)

    def _is_packed(self) -> bool:
        reads = self.shape is not None and self.geometry.reads(self.weight, self.shape)
        return self.traced == "call" and not self.exact and reads

    def _rescaling(self, step: float) -> None:
        """Keep `y / s_y = sums * factors + offsets`: the zero-point's share of every sum is known beforehand."""
        factors = self.grids.source.scale * self.scales.double() / step
        shift = -self.grids.source.zero_point * self.weight.sum(dim=(1, 2, 3), dtype=torch.int64).double() * factors
        if self.bias is not None:
            shift = shift + self.bias.double() / step
        self.register_buffer("factors", factors.float(), persistent=False)
        self.register_buffer("offsets", shift.float(), persistent=False)

    @property
    def out(self) -> ByteGrid | None:
        """Grid of the output, None for float32."""
        return self.grids.out

    @property
    def traced_as(self) -> str:
        """The form in which a compiler traces it, or "sum behind" where it adds the second operand itself."""
        summed = self.grids.addend is not None and self._packed.weight is not None
        return "sum behind" if summed else self.traced

    @property
    def kernel(self) -> str:
        """Name of the kernel that runs."""
        if self.exact:
            return kernels.EXACT_KERNEL
        return "onednn.qconv2d_pointwise" + (".binary" if self.grids.addend is not None else "")

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Return the convolution of x, plus the second operand."""
        if self.one_axis:
            x, other = x.unsqueeze(2), None if other is None else other.unsqueeze(2)
        if any(self.before):
            pad = pad_op if torch.compiler.is_compiling() else kernels.pad_u8
            x = pad(x, self.before, self.grids.source.zero_point)
        y = self._traced(x, other) if torch.compiler.is_compiling() else self._run(x, other)
        return y.squeeze(2) if self.one_axis else y

    def _run(self, x: Tensor, other: Tensor | None) -> Tensor:
        call = self._call.of(self.weight)
        if call is None:
            given = (self.weight, self.scales, self.bias, self.geometry, self.grids, x.shape, self.exact)
            call = self._call.keep(self.weight, kernels.prepared_conv(*given))
        if other is not None:
            order = torch.channels_last
            other = other.contiguous(memory_format=order) if self.may_overwrite else other.clone(memory_format=order)
        return call(x, other)

    def _traced(self, x: Tensor, other: Tensor | None) -> Tensor:
        out, addend = self.grids.out, self.grids.addend
        # An exported program holds what its ops are given: only this one takes a packed weight.
        exporting = torch.compiler.is_exporting()
        if self.traced == "call" or exporting:
            packed = None if exporting else self._packed.weight
            if packed is None:
                given = (self.packed, self.form, self.scales, self.bias, self.geometry, self.grids, other, self.exact)
                return conv2d_op(x, *given)
            # A sum costs less in the loop behind than in a custom op, which a compiler calls through Python.
            grids = self.grids if other is None else ConvGrids(self.grids.source, None)
            call = kernels.onednn_conv(packed, self.scales, self.zeros, self.bias, self.geometry, grids)
            real = call(x, None)
            if other is None or addend is None or out is None:
                return real
            return quantize_u8(real + dequantize_u8(other, addend), out)
        sums = self._sum_rows(x) if self.traced == "rows" else self._sum_shifted(x)
        real = torch.addcmul(self.offsets, sums, self.factors).permute(0, 3, 1, 2)
        if other is not None and addend is not None and out is not None:
            real = real + (other.to(torch.float32) - addend.zero_point) * (addend.scale / out.scale)
        return real if out is None else round_to_u8(real, 1.0, out)

    def _sum_rows(self, x: Tensor) -> Tensor:
        """Return the sums `(N, H', W', O)` of a filter of one pixel, float32."""
        rows, columns = self.geometry.stride
        pixels = x.permute(0, 2, 3, 1)[:, ::rows, ::columns]
        sums = kernels.matmul(pixels.reshape(-1, x.shape[1]), self.weight.flatten(1))
        return sums.float().view(*pixels.shape[:3], -1)

    def _sum_shifted(self, x: Tensor) -> Tensor:
        """Return the sums `(N, H', W', C)` of a depthwise filter, float32: below 2^24, so they are exact."""
        (top, left), step, gap = self.geometry.sizes[1], self.geometry.stride, self.geometry.dilation
        pixels = x.permute(0, 2, 3, 1)
        if top or left:
            pixels = F.pad(pixels, (0, 0, left, left, top, top), value=self.grids.source.zero_point)
        taps = self.weight.shape[2:]
        ends = [
            (size - (k - 1) * d - 1) // s * s + 1
            for size, k, d, s in zip(pixels.shape[1:3], taps, gap, step, strict=True)
        ]
        products = []
        for row, (i, j) in zip(self.taps, product(range(taps[0]), range(taps[1])), strict=True):
            y, z = i * gap[0], j * gap[1]
            seen = pixels[:, y : y + ends[0] : step[0], z : z + ends[1] : step[1]]
            products.append(seen.to(torch.float32) * row)
        total: Tensor = reduce(torch.add, products)
        return total

    def extra_repr(self) -> str:
        """Return the kernel and the grids in one line."""
        return f"{self.kernel}, in={self.grids.source}, out={self.grids.out or 'float32'}"


class _Packed:
    """Weights in oneDNN's order, which can be neither copied nor saved: a copy of the layer has none."""

    weight: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> _Packed:
        return _Packed()

    def __reduce__(self) -> tuple[type[_Packed], tuple[()]]:
        return _Packed, ()
