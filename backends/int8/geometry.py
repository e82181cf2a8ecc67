"""Geometry and grids of an integer convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from torch import Tensor

from fxquant.backends.affine import ByteGrid
from fxquant.core.errors import LoweringError


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

    def extents(self, weight: Tensor) -> tuple[int, int]:
        """Return the pixels from the first tap of a weight `(O, C, h, w)` to its last, in height and width."""
        (height, width), (rows, columns) = weight.shape[2:], self.dilation
        return (height - 1) * rows + 1, (width - 1) * columns + 1

    def least_image(self, weight: Tensor) -> tuple[float, float]:
        """Return the height and width from which on oneDNN 3.12 computes a convolution right.

        Where all taps of a window lie in the padding it reads outside of the image: if the padding is as wide as the
        filter, or the image falls between two taps. Where a stride leaves one column it writes wrong numbers.
        """
        extents = self.extents(weight)
        least = [
            inf if p >= extent else float(d) if p else 0.0
            for p, d, extent in zip(self.padding, self.dilation, extents, strict=True)
        ]
        stride = self.stride[1]
        two_columns = extents[1] + stride - 2 * self.padding[1] if stride > 1 else 0
        return least[0], max(least[1], two_columns)

    def reads(self, weight: Tensor, image: Sequence[int]) -> bool:
        """Whether oneDNN computes the convolution of an image `(N, C, H, W)` right; see `least_image`."""
        height, width = self.least_image(weight)
        return image[2] >= height and image[3] >= width


@dataclass(frozen=True)
class ConvGrids:
    """What a convolution of integers reads and writes.

    Args:
        source: grid of the input.
        out: grid of the output, None for float32.
        addend: grid of a second operand that is added before the only rounding, None for none.

    Raises:
        LoweringError: an addend without an output grid.
    """

    source: ByteGrid
    out: ByteGrid | None
    addend: ByteGrid | None = None

    def __post_init__(self) -> None:
        if self.addend is not None and self.out is None:
            raise LoweringError("a convolution that adds an operand writes integers; give it an output grid")
