"""DeepLabV3 on MobileNetV2 for the 21 classes of PASCAL VOC (arXiv 1706.05587 and 1801.04381), output stride 16.

Weights: Google's deeplabv3_mnv2_pascal_trainval (Apache-2.0), float16, BatchNorm folded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.weights import loaded

CLASSES = 21
_STAGES = (
    (1, 16, 1, 1, 1), (6, 24, 2, 2, 1), (6, 32, 3, 2, 1), (6, 64, 4, 2, 1),
    (6, 96, 3, 1, 1), (6, 160, 1, 1, 1), (6, 160, 2, 1, 2), (6, 320, 1, 1, 2),
)  # fmt: skip
"""Expansion, output channels, repeats, first stride and dilation of each stage."""


class Block(nn.Module):
    """Expand, filter depthwise, project linearly; adds its input where the shapes agree."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int, dilation: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expand = nn.Conv2d(channels, hidden, 1) if expansion > 1 else None
        # SAME padding is even here: every size is odd, 513 to 33.
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, dilation, dilation, groups=hidden)
        self.project = nn.Conv2d(hidden, width, 1)
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else F.relu6(self.expand(x))
        y: Tensor = self.project(F.relu6(self.depthwise(wide)))
        return x + y if self.residual else y


class DeepLab(nn.Module):
    """Images `(N, 3, 513, 513)` in -1..1 to class scores `(N, 21, 33, 33)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, width, repeats, first_stride, dilation in _STAGES:
            for index in range(repeats):
                blocks.append(Block(channels, width, first_stride if index == 0 else 1, expansion, dilation))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.aspp0 = nn.Conv2d(channels, 256, 1)
        self.image_pooling = nn.Conv2d(channels, 256, 1)
        self.concat_projection = nn.Conv2d(512, 256, 1)
        self.logits = nn.Conv2d(256, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.stem(x)))
        whole = F.relu(self.image_pooling(F.adaptive_avg_pool2d(x, 1)))
        joined = torch.cat((whole.expand(-1, -1, *x.shape[2:]), F.relu(self.aspp0(x))), 1)
        scores: Tensor = self.logits(F.relu(self.concat_projection(joined)))
        return scores


def deeplab() -> DeepLab:
    """Return the trained network."""
    return loaded(DeepLab(), "segmentation/deeplabv3_mnv2_voc_fp16.npz")
