"""A decoder of images, codes of 256 numbers to 64x64 pixels, with random weights: wide transposed convolutions.

The generator of DCGAN (Radford et al., arXiv 1511.06434) at twice its width; 1024 channels have 49 M weights.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

CODE = 256
SETTLED = 3
"""Batches that batch norms take their statistics from."""


class Decoder(nn.Module):
    """Codes `(N, 256)` to images `(N, 3, 64, 64)` in -1..1."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Unflatten(1, (CODE, 1, 1)), nn.ConvTranspose2d(CODE, width, 4)]
        for inputs, outputs in pairwise((width, width, width, width // 2, width // 4)):
            layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)]
        layers += [nn.BatchNorm2d(width // 4), nn.ReLU(), nn.Conv2d(width // 4, 3, 3, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, codes: Tensor) -> Tensor:
        image: Tensor = self.layers(codes)
        return image


def codes(count: int) -> Tensor:
    """Return seeded codes, shape (count, 256)."""
    return torch.randn(count, CODE, generator=torch.Generator().manual_seed(1))


def decoder(width: int = 1024) -> Decoder:
    """Return the network with seeded weights, and statistics of its batch norms from seeded codes."""
    torch.manual_seed(0)
    model = Decoder(width)
    with torch.no_grad():
        for batch in torch.split(codes(16 * SETTLED), 16):
            model(batch)
    return model.eval()
