"""IMDN x2 super-resolution (Hui et al. 2019): channel splits, concatenations and pixel shuffle.

Keys and weights: Zheng222/IMDN (no licence file; never shipped).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import set5
from benchmarks.zoo.weights import loaded

_WIDTH = 64
_DISTILLED = 16
_KEPT = _WIDTH - _DISTILLED
_SLOPE = 0.05
_SCALE = 2
_BLOCKS = 6
# ITU-R BT.601 luma of 8-bit RGB, studio range 16..235.
_LUMA = (65.481, 128.553, 24.966)


def _conv3(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, padding=1)


def _distilled(x: Tensor) -> tuple[Tensor, Tensor]:
    kept, rest = torch.split(F.leaky_relu(x, _SLOPE), [_DISTILLED, _KEPT], 1)
    return kept, rest


class ContrastAttention(nn.Module):
    """Scale each channel by a gate of its mean plus its standard deviation, `(N, 64, H, W)` in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_du = nn.Sequential(
            nn.Conv2d(_WIDTH, _WIDTH // 16, 1), nn.ReLU(), nn.Conv2d(_WIDTH // 16, _WIDTH, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        deviation = (x - mean).pow(2).mean((2, 3), keepdim=True).sqrt()
        gate: Tensor = self.conv_du(deviation + mean)
        return x * gate


class DistillationBlock(nn.Module):
    """Keep 16 channels of each of four convolutions and refine the rest, `(N, 64, H, W)` in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = _conv3(_WIDTH, _WIDTH)
        self.c2 = _conv3(_KEPT, _WIDTH)
        self.c3 = _conv3(_KEPT, _WIDTH)
        self.c4 = _conv3(_KEPT, _DISTILLED)
        self.cca = ContrastAttention()
        self.c5 = nn.Conv2d(_WIDTH, _WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = _distilled(self.c1(x))
        second, rest = _distilled(self.c2(rest))
        third, rest = _distilled(self.c3(rest))
        joined = torch.cat((first, second, third, self.c4(rest)), 1)
        y: Tensor = self.c5(self.cca(joined))
        return y + x


class Imdn(nn.Module):
    """Six distillation blocks and a pixel shuffle, RGB `(N, 3, H, W)` in 0..1 to `(N, 3, 2H, 2W)`."""

    def __init__(self) -> None:
        super().__init__()
        self.fea_conv = _conv3(3, _WIDTH)
        for index in range(1, _BLOCKS + 1):
            self.add_module(f"IMDB{index}", DistillationBlock())
        self.c = nn.Sequential(nn.Conv2d(_WIDTH * _BLOCKS, _WIDTH, 1), nn.LeakyReLU(_SLOPE))
        self.LR_conv = _conv3(_WIDTH, _WIDTH)
        self.upsampler = nn.Sequential(_conv3(_WIDTH, 3 * _SCALE**2), nn.PixelShuffle(_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        features = self.fea_conv(x)
        outputs = [features]
        for index in range(1, _BLOCKS + 1):
            outputs.append(self.get_submodule(f"IMDB{index}")(outputs[-1]))
        fused = self.LR_conv(self.c(torch.cat(outputs[1:], 1))) + features
        image: Tensor = self.upsampler(fused)
        return image


def _luma(images: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA).view(1, 3, 1, 1)
    # The network's own test script rounds luma to whole steps; without it the figure is 0.09 dB higher.
    return ((images * weights / 255.0).sum(1) + 16.0).round()


def psnr(model: Callable[[Tensor], Tensor], pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the mean peak signal-to-noise ratio in dB of luma over (low, high) images in 0..255, the border left out.

    `10 log10(255^2 / mean (y' - y)^2)`.
    """
    ratios = []
    for low, high in pairs:
        with torch.inference_mode():
            restored = (model(low / 255.0) * 255.0).clamp(0.0, 255.0).round()
        height, width = restored.shape[2:]
        inner = (..., slice(_SCALE, -_SCALE), slice(_SCALE, -_SCALE))
        error = _luma(restored)[inner] - _luma(high[:, :, :height, :width])[inner]
        ratios.append(10.0 * torch.log10(255.0**2 / error.pow(2).mean()).item())
    return sum(ratios) / len(ratios)


def set5_psnr(model: Callable[[Tensor], Tensor] | nn.Module, crop: int | None = None) -> float:
    """Return `psnr` on Set5; `crop` is the side of the centre square fed to the model, for graphs of one shape."""
    return psnr(model, [(low, high) for _, low, high in set5(crop)])


def imdn() -> Imdn:
    """Return the trained network."""
    return loaded(Imdn(), "superres/IMDN_x2.npz")
