"""Small networks in which channels can take factors, with the number of factors that are free in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Functional(nn.Module):
    """A network whose layers are given by name, and its forward by a function of them."""

    def __init__(self, forward: Callable[[_Functional, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


def _chain(middle: Callable[[Tensor], Tensor], wider: int = 6) -> nn.Module:
    return _Functional(
        lambda net, x: net.two(middle(net.one(x))).mean((2, 3)),
        one=nn.Conv2d(3, 6, 3, padding=1),
        two=nn.Conv2d(wider, 5, 3, padding=1),
    )


def _residual(net: _Functional, x: Tensor) -> Any:
    stem = torch.relu(net.stem(x))
    return net.head(torch.relu(stem + net.body(torch.relu(net.inner(stem)))).mean((2, 3)))


def _joined(net: _Functional, x: Tensor) -> Any:
    left, right = net.left(x), net.right(x)
    return net.head(F.max_pool2d(torch.cat([left, F.pad(right, (0, 0, 1, 0))[:, :, :-1]], 1), 3, 2, 1).mean((2, 3)))


def _split(net: _Functional, x: Tensor) -> Any:
    first, second = net.one(x).chunk(2, dim=1)
    return net.two(first).mean((2, 3)) + net.three(torch.relu(second)).mean((2, 3))


def _twice(net: _Functional, x: Tensor) -> Any:
    return net.head(torch.relu(net.shared(torch.relu(net.shared(net.stem(x))))).mean((2, 3)))


def _excited(net: _Functional, x: Tensor) -> Any:
    x = torch.relu(net.stem(x))
    gate = torch.sigmoid(net.gate(x.mean((2, 3), keepdim=True)))
    return net.head((x * gate).mean((2, 3)))


def _attention(net: _Functional, x: Tensor) -> Any:
    tokens = net.patch(x).flatten(2).transpose(1, 2) + net.position
    images, count, width = tokens.shape
    query, key, value = net.mixed(net.norm(tokens)).reshape(images, count, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
    summed = (query @ key.transpose(-2, -1)).softmax(-1) @ value
    tokens = tokens + net.out(summed.transpose(1, 2).reshape(images, count, width))
    return net.head(net.last(tokens).mean(1))


NETWORKS: dict[str, tuple[nn.Module, int]] = {
    "relu": (_chain(torch.relu), 6),
    "leaky_relu": (_chain(lambda x: F.leaky_relu(x, 0.1)), 6),
    "relu6": (_chain(F.relu6), 0),
    "gelu": (_chain(F.gelu), 0),
    "max_pool": (_chain(lambda x: F.max_pool2d(x, 3, 1, 1)), 6),
    "avg_pool": (_chain(lambda x: F.avg_pool2d(x, 3, 1, 1)), 6),
    "bilinear": (_chain(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")), 6),
    "nearest": (_chain(lambda x: F.interpolate(x, scale_factor=2.0)), 6),
    "zero_pad": (_chain(lambda x: F.pad(x, (1, 2, 0, 1))), 6),
    "one_pad": (_chain(lambda x: F.pad(x, (1, 2, 0, 1), value=1.0)), 0),
    "number": (_chain(lambda x: 3 * x / 2), 6),
    "shift": (_chain(lambda x: x + 0.5), 0),
    "channel_shuffle": (_chain(lambda x: F.channel_shuffle(x, 3)), 6),
    "depth_to_space": (
        _Functional(
            lambda net, x: net.two(F.pixel_shuffle(net.one(x), 2)).mean((2, 3)),
            one=nn.Conv2d(3, 8, 3, padding=1),
            two=nn.Conv2d(2, 4, 1),
        ),
        2,
    ),
    "grouped": (
        _Functional(
            lambda net, x: net.head(torch.relu(net.deep(torch.relu(net.grouped(torch.relu(net.one(x)))))).mean((2, 3))),
            one=nn.Conv2d(3, 6, 3),
            grouped=nn.Conv2d(6, 4, 3, groups=2),
            deep=nn.Conv2d(4, 8, 3, groups=4),
            head=nn.Linear(8, 3),
        ),
        18,
    ),
    "residual": (
        _Functional(
            _residual,
            stem=nn.Conv2d(3, 4, 3),
            inner=nn.Conv2d(4, 5, 1),
            body=nn.Conv2d(5, 4, 1),
            head=nn.Linear(4, 3),
        ),
        9,
    ),
    "joined": (_Functional(_joined, left=nn.Conv2d(3, 2, 3), right=nn.Conv2d(3, 3, 3), head=nn.Linear(5, 3)), 5),
    "split": (_Functional(_split, one=nn.Conv2d(3, 6, 3), two=nn.Conv2d(3, 2, 1), three=nn.Conv2d(3, 2, 1)), 6),
    "twice": (
        _Functional(_twice, stem=nn.Conv2d(3, 4, 3), shared=nn.Conv2d(4, 4, 3), head=nn.Linear(4, 2)),
        4,
    ),
    "excited": (
        _Functional(_excited, stem=nn.Conv2d(3, 4, 3), gate=nn.Conv2d(4, 4, 1), head=nn.Linear(4, 2)),
        4,
    ),
    "normalized": (
        _Functional(
            lambda net, x: net.two(torch.relu(net.norm(net.one(x)))).mean((2, 3)),
            one=nn.Conv2d(3, 4, 3),
            norm=nn.GroupNorm(2, 4),
            two=nn.Conv2d(4, 2, 3),
        ),
        4,
    ),
    "attention": (
        # The values of both heads, and the outputs of two normalizations.
        _Functional(
            _attention,
            patch=nn.Conv2d(3, 8, 4, 4),
            position=nn.Parameter(torch.randn(1, 4, 8)),
            norm=nn.LayerNorm(8),
            mixed=nn.Linear(8, 24),
            out=nn.Linear(8, 8),
            last=nn.LayerNorm(8),
            head=nn.Linear(8, 3),
        ),
        24,
    ),
}
"""Name -> a network for images of 3 x 8 x 8, and how many free factors it has."""


def network(name: str) -> nn.Module:
    """Return a network with seeded weights and affine parameters that are not 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    model = NETWORKS[name][0].eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
    return model


def images(count: int = 4) -> Tensor:
    """Return seeded images."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def scale_channel(model: nn.Module, channel: int, factor: float) -> None:
    """Scale an output channel of `one`, and undo it in `two`."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith("one."):
                value[channel] *= factor
            elif name == "two.weight":
                value[:, channel] /= factor
