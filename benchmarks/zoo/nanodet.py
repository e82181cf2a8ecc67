"""NanoDet-m: ShuffleNetV2 1.0x, a feature pyramid that only adds, and one depthwise head for each of three levels.

Weights: NanoDet (Apache-2.0) as in hpc203/nanodet-opncv-dnn-cpp-python, float16, BatchNorm folded; never shipped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.weights import loaded

CLASSES = 80
BINS = 8
"""Distances that a side of a box is the expectation over."""
_WIDTH = 96
_SLOPE = 0.1
_STAGES = ((24, 116, 4), (116, 232, 8), (232, 464, 4))
"""Channels in, channels out and units of stages 2 to 4."""


def _depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels)


def _activated(conv: nn.Module, x: Tensor) -> Tensor:
    return F.leaky_relu(conv(x), _SLOPE)


class ShuffleUnit(nn.Module):
    """Half of the channels pass, or are filtered depthwise at stride 2; the others go through three convolutions."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        half, taken = width // 2, channels if stride == 2 else channels // 2
        if stride == 2:
            self.branch1 = nn.ModuleList([_depthwise(channels, 2), nn.Conv2d(channels, half, 1)])
        self.branch2 = nn.ModuleList([nn.Conv2d(taken, half, 1), _depthwise(half, stride), nn.Conv2d(half, half, 1)])
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            passed, taken = _activated(self.branch1[1], self.branch1[0](x)), x
        else:
            passed, taken = x.chunk(2, dim=1)
        taken = self.branch2[1](_activated(self.branch2[0], taken))
        joined = torch.cat((passed, _activated(self.branch2[2], taken)), 1)
        batch, channels, height, width = joined.shape
        return joined.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, -1, height, width)


def _head() -> nn.ModuleList:
    twice = (conv for _ in range(2) for conv in (_depthwise(_WIDTH), nn.Conv2d(_WIDTH, _WIDTH, 1)))
    return nn.ModuleList([*twice, nn.Conv2d(_WIDTH, CLASSES + 4 * BINS, 1)])


class NanoDet(nn.Module):
    """Images `(N, 3, 320, 320)` to scores `(N, 2100, 80)` in 0..1 and distances `(N, 2100, 32)`, four sides of 8 bins.

    Anchors: the cells of the levels of stride 8, 16 and 32, row by row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        for number, (channels, width, units) in enumerate(_STAGES, start=2):
            first = ShuffleUnit(channels, width, 2)
            self.add_module(
                f"stage{number}", nn.Sequential(first, *(ShuffleUnit(width, width, 1) for _ in range(units - 1)))
            )
        self.lateral = nn.ModuleList(nn.Conv2d(width, _WIDTH, 1) for _, width, _ in _STAGES)
        self.head = nn.ModuleList(_head() for _ in _STAGES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(_activated(self.conv1, x), 3, stride=2, padding=1)
        levels: list[Tensor] = []
        for number, lateral in enumerate(self.lateral, start=2):
            x = self.get_submodule(f"stage{number}")(x)
            levels.append(lateral(x))
        for k in (1, 0):
            levels[k] = levels[k] + F.interpolate(levels[k + 1], scale_factor=2.0, mode="bilinear")
        for k in (1, 2):
            levels[k] = levels[k] + F.interpolate(levels[k - 1], scale_factor=0.5, mode="bilinear")
        answers = []
        for y, convs in zip(levels, self.head, strict=True):
            assert isinstance(convs, nn.ModuleList)
            for conv in convs[:-1]:
                y = _activated(conv, y)
            answers.append(convs[-1](y).flatten(2).transpose(1, 2))
        joined = torch.cat(answers, 1)
        return joined[..., :CLASSES].sigmoid(), joined[..., CLASSES:]


def nanodet() -> NanoDet:
    """Return the trained network."""
    return loaded(NanoDet(), "detection/nanodet_m_fp16.npz")
