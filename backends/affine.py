"""The uint8 values of one edge, and the way from real values to them and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fxquant.core.errors import LoweringError
from fxquant.core.ir import Grid

UINT8_MAX = 255

ROUNDER = 12582912.0
"""1.5 x 2^23: float32 numbers of this size are whole, so adding it rounds half to even in one pass."""


@dataclass(frozen=True)
class ByteGrid:
    """The uint8 values of one edge: real value `(q - zero_point) * scale`, q within `[low, high]`.

    Args:
        scale: step in real units, above 0.
        zero_point: the integer of the real value 0.0.
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
    def of(grid: Grid) -> ByteGrid:
        """Return a grid of one scale as kernels take it; a signed one is shifted up to start at 0."""
        shift = -grid.spec.qmin
        return ByteGrid(float(grid.scale), int(grid.zero_point) + shift, 0, grid.spec.qmax + shift)

    def clipped(self, low: float, high: float) -> ByteGrid:
        """Return the grid behind a clip of real values to `[low, high]`: the same integers, fewer of them."""
        bottom = self.low if low == -torch.inf else round(low / self.scale) + self.zero_point
        top = self.high if high == torch.inf else round(high / self.scale) + self.zero_point
        first = min(max(self.low, bottom), self.high)
        return ByteGrid(self.scale, self.zero_point, first, max(min(self.high, top), first))

    @property
    def saturates(self) -> bool:
        """Whether the bounds are those of uint8 itself, so that the conversion clamps by itself."""
        return self.low == 0 and self.high == UINT8_MAX


def quantize_u8(x: Tensor, grid: ByteGrid) -> Tensor:
    """Return `clamp(round(x / scale) + zero_point, low, high)` as uint8, half to even, of the shape of x."""
    return round_to_u8(x.float(), 1.0 / grid.scale, grid)


def round_to_u8(x: Tensor, factor: float, grid: ByteGrid) -> Tensor:
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


def dequantize_u8(q: Tensor, grid: ByteGrid) -> Tensor:
    """Return `(q - zero_point) * scale` as float32, of the shape of q."""
    if torch.compiler.is_compiling():
        return (q.to(torch.float32) - grid.zero_point) * grid.scale
    return q.to(torch.float32).sub_(grid.zero_point).mul_(grid.scale)
