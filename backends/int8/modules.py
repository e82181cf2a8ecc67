"""The nodes of an integer graph that hold no weights: conversions, sums, products and pools on grids.

Everything between two of them is a plain uint8 tensor. Under a tracing compiler each forward is plain ATen, which
Inductor fuses, or the `fxquant::conv2d_u8` op.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.backends.affine import ByteGrid, dequantize_u8, quantize_u8, round_to_u8, scalar
from fxquant.backends.int8 import kernels
from fxquant.backends.int8.custom_ops import pad_op


class Quantize(nn.Module):
    """float32 in, uint8 on the grid out."""

    def __init__(self, grid: ByteGrid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid."""
        return quantize_u8(x, self.grid)


class Dequantize(nn.Module):
    """uint8 on the grid in, float32 out."""

    def __init__(self, grid: ByteGrid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, q: Tensor) -> Tensor:
        """Return the real values of q."""
        return dequantize_u8(q, self.grid)


class IntegerAdd(nn.Module):
    """The sum of two uint8 tensors, each on its own grid, on a third grid.

    Args:
        left: grid of the first operand.
        right: grid of the second operand.
        out: grid of the sum.
        exact: do without integer kernels whatever the CPU can do.
    """

    def __init__(self, left: ByteGrid, right: ByteGrid, out: ByteGrid, exact: bool = False) -> None:
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
            total = torch.add(torch.add(scalar(-constant), a), b, alpha=ratio)
        return round_to_u8(total, self.left.scale / self.out.scale, self.out)

    def _pays_off(self, a: Tensor, b: Tensor) -> bool:
        """Whether one pass saves more than the oneDNN call costs; broadcasting is not for it."""
        large = a.numel() > kernels.ONE_PASS_FROM and a.shape == b.shape and a.dim() == 4
        return large and not self.exact and b.is_contiguous(memory_format=torch.channels_last)


class IntegerMul(nn.Module):
    """The product of two uint8 tensors, each on its own grid, on a third grid."""

    def __init__(self, left: ByteGrid, right: ByteGrid, out: ByteGrid) -> None:
        super().__init__()
        self.left, self.right, self.out = left, right, out

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product as uint8."""
        # Products of 8-bit integers are exact in float32; only the rescaling rounds.
        product = (a.to(torch.float32) - self.left.zero_point) * (b.to(torch.float32) - self.right.zero_point)
        return round_to_u8(product, self.left.scale * self.right.scale / self.out.scale, self.out)


class IntegerAveragePool(nn.Module):
    """The mean of uint8 over windows, or over the whole image, on another grid.

    Args:
        grid: of the input.
        out: of the output.
        window: arguments of `avg_pool2d` behind the input; None for the mean over both spatial axes.
        keepdim: for the whole image, keep the two axes with one pixel.
    """

    def __init__(self, grid: ByteGrid, out: ByteGrid, window: tuple[object, ...] | None, keepdim: bool = True) -> None:
        super().__init__()
        self.grid, self.out, self.window, self.keepdim = grid, out, window, keepdim

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean as uint8."""
        if self.window is None:
            pixels = x.shape[-1] * x.shape[-2]
            total = x.sum((-2, -1), keepdim=self.keepdim, dtype=torch.int32).to(torch.float32)
            centred = total - self.grid.zero_point * pixels
            return round_to_u8(centred, self.grid.scale / self.out.scale / pixels, self.out)
        centred = x.to(torch.float32) - self.grid.zero_point
        pool = torch.ops.aten.avg_pool2d.default if x.dim() == 4 else torch.ops.aten.avg_pool1d.default
        return round_to_u8(pool(centred, *self.window), self.grid.scale / self.out.scale, self.out)


class IntegerPad(nn.Module):
    """Constant padding of uint8.

    Args:
        pads: integers to add before and behind each axis, the last axis first; below zero they crop.
        value: the integer of the real value 0.
    """

    def __init__(self, pads: tuple[int, ...], value: int) -> None:
        super().__init__()
        self.pads, self.value = pads, value

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded tensor."""
        if x.dim() != 4 or len(self.pads) != 4 or min(self.pads) < 0:
            return F.pad(x, self.pads, value=self.value)
        pad = pad_op if torch.compiler.is_compiling() else kernels.pad_u8
        return pad(x, self.pads, self.value)


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
