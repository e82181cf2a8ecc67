"""The layers of random families that are more than one module of PyTorch; all keep the number of channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8
"""Channels of every value between the layers."""


class Twice(nn.Module):
    """One layer that is called on its own result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layer(torch.relu(self.layer(x)))
        return answer


class Residual(nn.Module):
    """A layer whose input is added to its result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.layer(x))


class Computed(nn.Module):
    """A convolution or linear layer whose weight is worked out from parameters."""

    def __init__(self, way: str, *shape: int) -> None:
        super().__init__()
        self.way, self.weight = way, nn.Parameter(torch.randn(*shape) / 5)
        self.gain = nn.Parameter(torch.rand(shape[0], *[1] * (len(shape) - 1)) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = {
            "gain": lambda: self.weight * self.gain,
            "standardized": lambda: (self.weight - self.weight.mean(1, keepdim=True)) * self.gain,
            "normalized": lambda: F.normalize(self.weight, dim=1) * self.gain,
        }[self.way]()
        return F.conv2d(x, weight, padding=1) if weight.dim() == 4 else F.linear(x, weight)


class First(nn.Module):
    """The sequence that a recurrent layer returns, without its state."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        swap = not self.layer.batch_first
        made: Tensor = self.layer(x.transpose(0, 1) if swap else x)[0]
        return made.transpose(0, 1) if swap else made


class Cell(nn.Module):
    """A recurrent cell that is called at every step."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        made = []
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            made.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(made, 1)


class AlongTime(nn.Module):
    """A layer of (N, C, T) between values of (N, T, C)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layer(x.transpose(1, 2)).transpose(1, 2)
        return answer


class AsVolume(nn.Module):
    """A 3-d layer on halves of the channels as two slices."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        count, channels, *pixels = x.shape
        answer: Tensor = self.layer(x.reshape(count, channels // 2, 2, *pixels)).flatten(1, 2)
        return answer


class Parts(nn.Module):
    """A layer on some of the channels, joined with the others and what it makes of them."""

    def __init__(self, way: str, layer: nn.Module) -> None:
        super().__init__()
        self.way, self.layer = way, layer
        self.join = nn.Conv2d(12 if way == "chunk" else WIDTH, WIDTH, 1) if way != "shuffle" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "chunk":
            first, second = x.chunk(2, 1)
            joined = torch.cat([first, second, self.layer(second)], 1)
        elif self.way == "split":
            rest, taken = torch.split_with_sizes(x, [WIDTH - 4, 4], 1)
            joined = torch.cat([self.layer(taken), rest], 1)
        else:
            rest, taken = x[:, : WIDTH // 2], x[:, WIDTH // 2 :]
            both = torch.stack([rest, self.layer(taken)], 2)
            joined = both.flatten(1, 2)
        answer: Tensor = self.join(joined)
        return answer


class Products(nn.Module):
    """Products of a value and what a layer makes of it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first, self.layer = way, nn.Linear(WIDTH, WIDTH), nn.Bilinear(WIDTH, WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(1, WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "bilinear":
            answer: Tensor = self.layer(x, torch.relu(self.first(x)))
            return answer
        if self.way == "baddbmm":
            return torch.baddbmm(self.first(x), x, self.weight.expand(x.shape[0], -1, -1), beta=0.5)
        return torch.einsum("ntc,dc->ntd", self.first(x), self.weight[0])
