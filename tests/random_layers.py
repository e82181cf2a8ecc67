"""The layers of random graphs that are more than one op, and the functions that are not layers, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Call(nn.Module):
    """A function of tensors as a module without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


class Attention(nn.Module):
    """Self-attention over tokens, written as PyTorch's op or by hand."""

    def __init__(self, width: int, heads: int, way: str) -> None:
        super().__init__()
        self.heads, self.way = heads, way
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        parts = self.qkv(x).reshape(count, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0) if self.way == "unbind" else (parts[0], parts[1], parts[2])
        if self.way == "by hand":
            mixed = torch.softmax(q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5, dim=-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        answer: Tensor = self.proj(mixed.transpose(1, 2).reshape(count, tokens, width))
        return answer


class Squeeze(nn.Module):
    """Squeeze and excitation: channels weighted by what a bottleneck makes of their means."""

    def __init__(self, width: int, gate: str) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.down(F.adaptive_avg_pool2d(x, 1)))
        gate = torch.sigmoid if self.gate == "sigmoid" else F.hardsigmoid
        return x * gate(self.up(inner))


class Offset(nn.Module):
    """A learned number per channel that is added, or multiplied by."""

    def __init__(self, channels: int, rank: int, way: str) -> None:
        super().__init__()
        self.value, self.way = nn.Parameter(torch.randn(channels, *[1] * (rank - 2)) + 1), way

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value if self.way == "add" else x * self.value


class TokensFirst(nn.Module):
    """A linear layer on tokens whose images are on the second axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.fc(x.permute(1, 0, 2)).permute(1, 0, 2)
        return answer


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "clip": lambda x: torch.clamp(x, 0.0, 1.0),
    "clip_low": lambda x: torch.clamp(x, min=0.5),
    "clip_high": lambda x: torch.clamp(x, max=0.5),
    "tanh": torch.tanh,
    "elu": F.elu,
    "softplus": F.softplus,
    "mish": F.mish,
    "erf": torch.erf,
    "abs": torch.abs,
}
"""Name -> function; the first ones have rows in the op table, the last ones have none."""
