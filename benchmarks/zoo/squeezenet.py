"""SqueezeNet 1.1 (Iandola et al. 2016), where every fire module joins two branches by concatenation.

Keys are torchvision's. Weights: nihui/ncnn-assets, stored as float16 (upstream BSD-2-Clause).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.weights import loaded


class Fire(nn.Module):
    """Squeeze to few channels, expand by 1x1 and 3x3 side by side: `(N, C, H, W)` to `(N, 2 * width, H, W)`."""

    def __init__(self, channels: int, squeeze: int, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, width, 1)
        self.expand3x3 = nn.Conv2d(squeeze, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat((F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))), 1)


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


class SqueezeNet(nn.Module):
    """Eight fire modules, `(N, 3, 227, 227)` BGR less the Caffe mean to logits `(N, 1000)`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), _pool(),
            Fire(64, 16, 64), Fire(128, 16, 64), _pool(),
            Fire(128, 32, 128), Fire(256, 32, 128), _pool(),
            Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(512, 1000, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.classifier(self.features(x)), 1).flatten(1)


def squeezenet() -> SqueezeNet:
    """Return the trained network."""
    return loaded(SqueezeNet(), "imagenet_weights/squeezenet1_1_fp16.npz")
