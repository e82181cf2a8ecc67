"""MobileNetV2, width 1.0, BatchNorm folded into biases (Sandler et al. 2018, table 2).

Keys are torchvision's. Weights: Google's mobilenet_v2_1.0_224.tflite (Apache-2.0), true float but for the classifier,
which was dequantised from int8 per channel.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.padding import same_3x3
from benchmarks.zoo.weights import loaded

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, output channels, repeats and first stride of each stage."""


def _activated(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project linearly; adds its input where the shapes agree."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        expand = [_activated(nn.Conv2d(channels, hidden, 1))] if expansion > 1 else []
        depthwise = _activated(same_3x3(hidden, hidden, stride, groups=hidden))
        self.conv = nn.Sequential(*expand, depthwise, nn.Conv2d(hidden, width, 1))
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Seventeen inverted residuals, `(N, 3, 224, 224)` in -1..1 to logits `(N, 1000)`."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_activated(same_3x3(3, 32, 2))]
        channels = 32
        for expansion, width, repeats, first_stride in _STAGES:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                layers.append(InvertedResidual(channels, width, stride, expansion))
                channels = width
        layers.append(_activated(nn.Conv2d(channels, 1280, 1)))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        logits: Tensor = self.classifier(x)
        return logits


def mobilenet_v2() -> MobileNetV2:
    """Return the trained network."""
    return loaded(MobileNetV2(), "imagenet_weights/mobilenetv2_100_224_float.npz")
