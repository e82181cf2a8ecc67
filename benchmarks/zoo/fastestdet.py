"""FastestDet: a narrow ShuffleNetV2, three scales pooled to one, and one anchor-free head of 22 x 22 cells.

Keys and weights: dog-qiuqiu/FastestDet (BSD-3-Clause; never shipped), BatchNorm not folded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.weights import loaded

CLASSES = 80
_WIDTH = 96
_STAGES = ((24, 48, 4), (48, 96, 8), (96, 192, 4))
"""Channels in, channels out and units of stages 2 to 4."""


def _layer(
    channels: int, width: int, kernel: int = 1, stride: int = 1, groups: int = 1, active: bool = True
) -> list[nn.Module]:
    """Return a convolution without bias, its BatchNorm and, if it is active, a ReLU."""
    conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(width), *([nn.ReLU()] if active else [])]


class ShuffleUnit(nn.Module):
    """Even channels pass, odd ones are filtered; at stride 2 both branches filter all channels."""

    def __init__(self, channels: int, width: int, middle: int, stride: int) -> None:
        super().__init__()
        taken = channels if stride == 2 else channels // 2
        passed = taken
        self.branch_main = nn.Sequential(
            *_layer(taken, middle),
            *_layer(middle, middle, 3, stride, middle, active=False),
            *_layer(middle, width - passed),
        )
        self.branch_proj = (
            nn.Sequential(*_layer(channels, channels, 3, 2, channels, active=False), *_layer(channels, channels))
            if stride == 2
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.branch_proj is not None:
            return torch.cat((self.branch_proj(x), self.branch_main(x)), 1)
        batch, channels, height, width = x.shape
        # As its author wrote it.
        halves = x.reshape(batch * channels // 2, 2, height * width).permute(1, 0, 2)
        passed, taken = halves.reshape(2, -1, channels // 2, height, width)
        return torch.cat((passed, self.branch_main(taken)), 1)


class Backbone(nn.Module):
    """Images to the answers of stages 2, 3 and 4, at strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*_layer(3, 24, 3, 2))
        for number, (channels, width, units) in enumerate(_STAGES, start=2):
            first = ShuffleUnit(channels, width, channels, 2)
            others = (ShuffleUnit(width, width, width // 2, 1) for _ in range(units - 1))
            self.add_module(f"stage{number}", nn.Sequential(first, *others))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(self.first_conv(x), 3, stride=2, padding=1)
        answers = []
        for number in (2, 3, 4):
            x = self.get_submodule(f"stage{number}")(x)
            answers.append(x)
        return answers


class Pointwise(nn.Module):
    """A 1x1 convolution with BatchNorm and ReLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Sequential(*_layer(channels, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv1x1(x)
        return y


def _depthwise() -> list[nn.Module]:
    return _layer(_WIDTH, _WIDTH, 5, 1, _WIDTH)


class Pooling(nn.Module):
    """Three stacks of one, two and three 5x5 depthwise convolutions side by side, around a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.Conv1x1 = Pointwise(channels, _WIDTH)
        self.S1, self.S2, self.S3 = (
            nn.Sequential(*(layer for _ in range(count) for layer in _depthwise())) for count in (1, 2, 3)
        )
        self.output = nn.Sequential(*_layer(3 * _WIDTH, _WIDTH, active=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv1x1(x)
        return F.relu(x + self.output(torch.cat((self.S1(x), self.S2(x), self.S3(x)), 1)))


class Branch(nn.Module):
    """A 5x5 depthwise convolution and a 1x1 one to `width` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv5x5 = nn.Sequential(*_depthwise(), *_layer(_WIDTH, width, active=False))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv5x5(x)
        return y


class Head(nn.Module):
    """Features to objectness in 0..1, boxes and class probabilities of each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1x1 = Pointwise(_WIDTH, _WIDTH)
        self.obj_layers, self.reg_layers, self.cls_layers = Branch(1), Branch(4), Branch(CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.conv1x1(x)
        return self.obj_layers(x).sigmoid(), self.reg_layers(x), self.cls_layers(x).softmax(1)


class FastestDet(nn.Module):
    """Images `(N, 3, 352, 352)` to objectness `(N, 1, 22, 22)`, boxes `(N, 4, 22, 22)`, classes `(N, 80, 22, 22)`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.SPP = Pooling(sum(width for _, width, _ in _STAGES))
        self.detect_head = Head()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, coarse = self.backbone(x)
        joined = torch.cat((F.avg_pool2d(fine, 3, 2, 1), middle, F.interpolate(coarse, scale_factor=2.0)), 1)
        answers: tuple[Tensor, Tensor, Tensor] = self.detect_head(self.SPP(joined))
        return answers


def fastestdet() -> FastestDet:
    """Return the trained network."""
    return loaded(FastestDet(), "detection/fastestdet.npz")
