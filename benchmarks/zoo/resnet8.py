"""ResNet-8 for CIFAR-10 of the MLPerf Tiny benchmark (Banbury et al. 2021), BatchNorm folded.

Weights: mlcommons/tiny (Apache-2.0). The network normalises inside: it takes raw pixels 0..255.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.padding import same_3x3
from benchmarks.zoo.weights import loaded


class Stack(nn.Module):
    """Two 3x3 convolutions with an identity or 1x1 shortcut, `(N, C, H, W)` to `(N, width, H / stride, W / stride)`."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = same_3x3(channels, width, stride)
        self.conv2 = same_3x3(width, width, 1)
        self.short = nn.Conv2d(channels, width, 1, stride=stride) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        return F.relu(y + self.short(x))


class ResNet8(nn.Module):
    """Three stacks, `(N, 3, 32, 32)` in 0..255 to logits `(N, 10)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = same_3x3(3, 16, 1)
        self.s1 = Stack(16, 16, 1)
        self.s2 = Stack(16, 32, 2)
        self.s3 = Stack(32, 64, 2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.s3(self.s2(self.s1(F.relu(self.stem(x)))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def resnet8() -> ResNet8:
    """Return the trained network."""
    return loaded(ResNet8(), "mlperf_tiny/resnet8_cifar10.npz")
