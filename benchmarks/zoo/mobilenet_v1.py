"""MobileNetV1, width 0.25, BatchNorm folded into biases (Howard et al. 2017, table 1).

Weights: Google's TF-Hub module (Apache-2.0 upstream), true float32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.padding import same_3x3
from benchmarks.zoo.weights import loaded

_BLOCKS = (
    (16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1),
    (128, 1), (128, 1), (128, 1), (128, 1), (256, 2), (256, 1),
)  # fmt: skip
"""Output channels and stride of each depthwise-separable block at width 0.25."""


class MobileNetV1(nn.Module):
    """Thirteen depthwise-separable blocks, `(N, 3, 224, 224)` in -1..1 to logits `(N, 1000)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = same_3x3(3, 8, 2)
        inputs = (8, *(width for width, _ in _BLOCKS[:-1]))
        self.dw = nn.ModuleList(
            same_3x3(channels, channels, stride, groups=channels)
            for channels, (_, stride) in zip(inputs, _BLOCKS, strict=True)
        )
        self.pw = nn.ModuleList(
            nn.Conv2d(channels, width, 1) for channels, (width, _) in zip(inputs, _BLOCKS, strict=True)
        )
        self.fc = nn.Linear(256, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        for depthwise, pointwise in zip(self.dw, self.pw, strict=True):
            x = F.relu6(pointwise(F.relu6(depthwise(x))))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: Tensor = self.fc(x)
        return logits


def mobilenet_v1() -> MobileNetV1:
    """Return the trained network."""
    return loaded(MobileNetV1(), "imagenet_weights/mobilenetv1_025_224_fp32.npz")
