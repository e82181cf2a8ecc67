"""The convolution of TensorFlow-born networks, whose SAME padding is uneven at stride 2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

STRIDE_2_PAD = (0, 1, 0, 1)
"""SAME padding (left, right, top, bottom) of a 3x3 kernel at stride 2 on an even-sized image."""


class PaddedConv2d(nn.Conv2d):
    """A convolution after fixed zero padding (left, right, top, bottom), `(N, C, H, W)` in and out.

    Source: tensorflow.org/api_docs/python/tf/nn, "Notes on padding".
    """

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: int | tuple[int, int],
        pad: tuple[int, int, int, int],
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        left, right, top, bottom = pad
        # Even padding stays an attribute of the convolution, as any author would write it.
        even = left == right and top == bottom
        padding = (top, left) if even else (0, 0)
        super().__init__(channels, width, kernel, stride=stride, padding=padding, groups=groups)
        self.uneven = None if even else pad

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.uneven is None else F.pad(x, self.uneven))


def same_3x3(channels: int, width: int, stride: int, groups: int = 1) -> PaddedConv2d:
    """Return a 3x3 convolution with SAME padding for even-sized images, stride 1 or 2."""
    pad = STRIDE_2_PAD if stride == 2 else (1, 1, 1, 1)
    return PaddedConv2d(channels, width, 3, pad, stride, groups)
