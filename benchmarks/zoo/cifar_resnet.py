"""ResNet-20 and ResNet-32 for CIFAR-10 with parameter-free shortcuts (He et al. 2015, section 4.2, option A).

Keys and weights: akamaster/pytorch_resnet_cifar10 (BSD-2-Clause).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.weights import loaded


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, `(N, C, H, W)` to `(N, width, H / stride, W / stride)`."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.extra = (width - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1:
            # Option A: drop every other pixel and pad the channels with zeros on both sides.
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(y + x)


def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(channels, width, stride)
    return nn.Sequential(first, *(Block(width, width, 1) for _ in range(blocks - 1)))


class CifarResNet(nn.Module):
    """Three stages of `blocks` residual blocks, `(N, 3, 32, 32)` to logits `(N, 10)`."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: Tensor = self.linear(x)
        return logits


def resnet20() -> CifarResNet:
    """Return the trained 20-layer network."""
    return loaded(CifarResNet(3), "cifar10_weights/resnet20.npz")


def resnet32() -> CifarResNet:
    """Return the trained 32-layer network."""
    return loaded(CifarResNet(5), "cifar10_weights/resnet32.npz")
