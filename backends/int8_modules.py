"""The nodes of an integer graph: modules that hold integer weights and grids, and call the kernels.

Everything between two of them is a plain uint8 tensor. Under a tracing compiler each forward is plain ATen, which
Inductor fuses, or the `fxquant::conv2d_u8` op.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.backends import int8_kernels as kernels
from fxquant.backends.int8_kernels import ConvGeometry, Grid
from fxquant.backends.int8_ops import conv2d_op

EXACT_KERNEL = "float64 on integers"


class Quantize(nn.Module):
    """float32 in, uint8 on the grid out."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid."""
        return kernels.quantize_u8(x, self.grid)


class Dequantize(nn.Module):
    """uint8 on the grid in, float32 out."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, q: Tensor) -> Tensor:
        """Return the real values of q."""
        return kernels.dequantize_u8(q, self.grid)


class IntegerConv(nn.Module):
    """A convolution over one or two axes: uint8 in, uint8 or float32 out.

    Args:
        weight: int8 `(O, C / groups, h, w)`, or without h for one axis.
        scales: float32 `(O,)`.
        bias: float32 `(O,)` or None.
        grid: of the input.
        geometry: of the 2-d convolution; one axis counts as the width.
        out: grid of the output, None for float32.
        before: zeros to add at left, right, top, bottom, beyond what `geometry` pads on both sides alike.
        exact: take the float64 route whatever the CPU can do.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        grid: Grid,
        geometry: ConvGeometry,
        out: Grid | None,
        before: tuple[int, int, int, int] = (0, 0, 0, 0),
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.one_axis = weight.dim() == 3
        self.register_buffer("weight", weight.unsqueeze(2) if self.one_axis else weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.grid, self.geometry, self.out, self.before = grid, geometry, out, before
        self.exact = exact or not kernels.conv_kernel_is_exact()

    @property
    def kernel(self) -> str:
        """Name of the kernel that runs."""
        return EXACT_KERNEL if self.exact else "onednn.qconv2d_pointwise"

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x."""
        x = x.unsqueeze(2) if self.one_axis else x
        if any(self.before):
            x = F.pad(x, self.before, value=self.grid.zero_point)
        conv = conv2d_op if torch.compiler.is_compiling() else kernels.conv2d
        y = conv(x, self.weight, self.scales, self.bias, self.grid, self.geometry, self.out, self.exact)
        return y.squeeze(2) if self.one_axis else y

    def extra_repr(self) -> str:
        """Return the kernel and the grids in one line."""
        return f"{self.kernel}, in={self.grid}, out={self.out or 'float32'}"


class IntegerLinear(nn.Module):
    """A linear layer: uint8 in, uint8 or float32 out.

    Args:
        weight: int8 `(N, K)`.
        scales: float32 `(N,)`.
        bias: float32 `(N,)` or None.
        grid: of the input.
        out: grid of the output, None for float32.
        packed: use oneDNN's packed product (faster for large ones) instead of `torch._int_mm`.
        exact: take the float64 route whatever the CPU can do.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    factors: Tensor
    offsets: Tensor

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        grid: Grid,
        out: Grid | None,
        packed: bool = False,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.out = grid, out
        self.exact = exact or not kernels.matmul_kernel_is_exact()
        self.packed = packed and not self.exact and kernels.conv_kernel_is_exact()
        # The zero-point's share of every sum is known beforehand, in integers: z_x * sum(w).
        step = grid.scale * scales.double() / (1.0 if out is None else out.scale)
        shift = -grid.zero_point * weight.sum(dim=1, dtype=torch.int64).double() * step
        if bias is not None:
            shift = shift + bias.double() / (1.0 if out is None else out.scale)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.register_buffer("factors", step.float())
        self.register_buffer("offsets", shift.float())

    @property
    def kernel(self) -> str:
        """Name of the kernel that runs."""
        if self.exact:
            return EXACT_KERNEL
        return "onednn.qlinear_pointwise" if self.packed else "aten._int_mm"

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of x `(..., K)` as `(..., N)`."""
        rows = x.reshape(-1, x.shape[-1])
        if self.packed and not torch.compiler.is_compiling():
            real = kernels.onednn_linear(rows, self.weight, self.scales, self.bias, self.grid)
            y = real if self.out is None else kernels.quantize_u8(real, self.out)
        else:
            sums = kernels.matmul(rows, self.weight, self.exact).float()
            real = torch.addcmul(self.offsets, sums, self.factors)
            y = real if self.out is None else kernels.round_to_u8(real, 1.0, self.out)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        """Return the kernel and the grids in one line."""
        return f"{self.kernel}, in={self.grid}, out={self.out or 'float32'}"


class IntegerAdd(nn.Module):
    """The sum of two uint8 tensors on grids of their own, on a third grid.

    Args:
        left: grid of the first operand.
        right: grid of the second operand.
        out: grid of the sum.
        exact: do without integer kernels whatever the CPU can do.
    """

    def __init__(self, left: Grid, right: Grid, out: Grid, exact: bool = False) -> None:
        super().__init__()
        self.left, self.right, self.out = left, right, out
        self.exact = exact or not kernels.conv_kernel_is_exact()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sum as uint8."""
        # In units of the left grid, as one subtraction, one scaled sum and the rounding.
        ratio = self.right.scale / self.left.scale
        constant = self.left.zero_point + self.right.zero_point * ratio
        if torch.compiler.is_compiling():
            total = a.to(torch.float32) + b.to(torch.float32) * ratio - constant
        elif self._pays_off(a, b):
            return kernels.onednn_add(a, b, self.left, self.right, self.out)
        else:
            # A float scalar tensor turns uint8 into float32 in the same pass over memory.
            total = torch.add(torch.add(kernels.scalar(-constant), a), b, alpha=ratio)
        return kernels.round_to_u8(total, self.left.scale / self.out.scale, self.out)

    def _pays_off(self, a: Tensor, b: Tensor) -> bool:
        """Whether one pass saves more than the oneDNN call costs; broadcasting is not for it."""
        large = a.numel() > kernels.ONE_PASS_FROM and a.shape == b.shape and a.dim() == 4
        return large and not self.exact and b.is_contiguous(memory_format=torch.channels_last)


class IntegerMul(nn.Module):
    """The product of two uint8 tensors on grids of their own, on a third grid."""

    def __init__(self, left: Grid, right: Grid, out: Grid) -> None:
        super().__init__()
        self.left, self.right, self.out = left, right, out

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product as uint8."""
        # Products of 8-bit integers are exact in float32; only the rescaling rounds.
        product = (a.to(torch.float32) - self.left.zero_point) * (b.to(torch.float32) - self.right.zero_point)
        return kernels.round_to_u8(product, self.left.scale * self.right.scale / self.out.scale, self.out)


class IntegerAveragePool(nn.Module):
    """The mean of uint8 over windows, or over the whole image, on another grid.

    Args:
        grid: of the input.
        out: of the output.
        window: arguments of `avg_pool2d` behind the input; None for the mean over both spatial axes.
        keepdim: for the whole image, keep the two axes with one pixel.
    """

    def __init__(self, grid: Grid, out: Grid, window: tuple[object, ...] | None, keepdim: bool = True) -> None:
        super().__init__()
        self.grid, self.out, self.window, self.keepdim = grid, out, window, keepdim

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean as uint8."""
        if self.window is None:
            pixels = x.shape[-1] * x.shape[-2]
            total = x.sum((-2, -1), keepdim=self.keepdim, dtype=torch.int32).to(torch.float32)
            centred = total - self.grid.zero_point * pixels
            return kernels.round_to_u8(centred, self.grid.scale / self.out.scale / pixels, self.out)
        centred = x.to(torch.float32) - self.grid.zero_point
        pool = torch.ops.aten.avg_pool2d.default if x.dim() == 4 else torch.ops.aten.avg_pool1d.default
        return kernels.round_to_u8(pool(centred, *self.window), self.grid.scale / self.out.scale, self.out)


class IntegerMaxPool(nn.Module):
    """Max pooling of uint8 as maxima of shifted slices: PyTorch's own refuses uint8 in channels-last order.

    Args:
        kernel: window per spatial axis.
        stride: step per spatial axis.
        padding: added on both sides per spatial axis; the smallest integer, so it never wins.
    """

    def __init__(self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima as uint8."""
        if any(self.padding):
            x = F.pad(x, [size for size in reversed(self.padding) for _ in range(2)])
        # Separable: one axis after the other, k - 1 maxima each.
        for axis, (size, step) in enumerate(zip(self.kernel, self.stride, strict=True), x.dim() - len(self.kernel)):
            count = (x.shape[axis] - size) // step + 1
            best = x.narrow(axis, 0, (count - 1) * step + 1)[_every(axis, step)]
            for shift in range(1, size):
                best = torch.maximum(best, x.narrow(axis, shift, (count - 1) * step + 1)[_every(axis, step)])
            x = best
        return x


def _every(axis: int, step: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(None, None, step))
