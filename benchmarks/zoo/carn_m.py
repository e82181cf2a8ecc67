"""CARN-M x2 super-resolution (Ahn et al. 2018): cascading blocks of grouped convolutions, one unit used three times.

Keys and weights: nmhkahn/CARN-pytorch (MIT; never shipped).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.weights import loaded

_WIDTH = 64
_GROUPS = 4
_SCALE = 2
_STEPS = 3
_MEAN = (0.4488, 0.4371, 0.4040)


class EfficientUnit(nn.Module):
    """Two grouped convolutions and a pointwise one around a residual, `(N, 64, H, W)` in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, groups=_GROUPS)
        self.conv2 = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, groups=_GROUPS)
        self.conv3 = nn.Conv2d(_WIDTH, _WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))) + x)


def _fusions() -> nn.ModuleList:
    return nn.ModuleList(nn.Conv2d(_WIDTH * (step + 2), _WIDTH, 1) for step in range(_STEPS))


class CascadingBlock(nn.Module):
    """The same unit three times, each time fused with all that came before, `(N, 64, H, W)` in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = EfficientUnit()
        self.fuse = _fusions()

    def forward(self, x: Tensor) -> Tensor:
        joined, y = x, x
        for fuse in self.fuse:
            joined = torch.cat((joined, self.unit(y)), 1)
            y = F.relu(fuse(joined))
        return y


class CarnM(nn.Module):
    """Three cascading blocks and a pixel shuffle, RGB `(N, 3, H, W)` in 0..1 to `(N, 3, 2H, 2W)`."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, _WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(CascadingBlock() for _ in range(_STEPS))
        self.fuse = _fusions()
        self.up = nn.Conv2d(_WIDTH, _WIDTH * _SCALE**2, 3, padding=1, groups=_GROUPS)
        self.exit = nn.Conv2d(_WIDTH, 3, 3, padding=1)
        # Not among the file's weights.
        self.register_buffer("mean", torch.tensor(_MEAN).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.entry(x - self.mean)
        joined = y
        for block, fuse in zip(self.blocks, self.fuse, strict=True):
            joined = torch.cat((joined, block(y)), 1)
            y = F.relu(fuse(joined))
        image: Tensor = self.exit(F.pixel_shuffle(F.relu(self.up(y)), _SCALE)) + self.mean
        return image


def carn_m() -> CarnM:
    """Return the trained network."""
    return loaded(CarnM(), "superres/CARN_M_x2.npz")
