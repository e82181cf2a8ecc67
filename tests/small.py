"""A tiny network, its images and its results, for tests of everything behind the pipeline; names for `--model`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

import fxquant
from fxquant.core.facts import Budget
from fxquant.result import Result


class SmallNet(nn.Module):
    """Two convolutions, one of which has a dead channel, and a classifier; the embedding-free minimum of a road."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(torch.relu(self.stem(x))))
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


class ProductNet(SmallNet):
    """With a product of two activations, which stays in float."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        return torch.matmul(scores.unsqueeze(2), scores.unsqueeze(1)).flatten(1) + 1.0


class Branching(nn.Module):
    """Control flow that no export can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) if x.sum() > 0 else x.flatten(1)[:, :3]


def small() -> nn.Module:
    """Return the network with seeded weights and a channel that is always zero."""
    return _seeded(SmallNet())


def product() -> nn.Module:
    """Return the network whose last op stays in float."""
    return _seeded(ProductNet())


def branching() -> nn.Module:
    """Return a network that does not export."""
    return Branching()


def not_finite() -> nn.Module:
    """Return the network with a NaN weight."""
    model = _seeded(SmallNet())
    with torch.no_grad():
        model.body.weight.fill_(torch.nan)
    return model


def no_model() -> int:
    """Return what is no model."""
    return 3


def failing() -> nn.Module:
    """Fail as a user's factory might."""
    raise RuntimeError("checkpoint\nis gone")


def _seeded(model: SmallNet) -> SmallNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():
            model.stem.weight[1] = 0.0
            _ = None if model.stem.bias is None else model.stem.bias.fill_(-0.1)
    return model.eval()


def images(count: int = 24) -> Tensor:
    """Return seeded images, float32 of shape (count, 1, 8, 8)."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def one_image() -> Tensor:
    """Return a single image."""
    return images(1)


def wrong_shape() -> Tensor:
    """Return images with three channels for a network that takes one."""
    return torch.zeros(8, 3, 8, 8)


def nan_images() -> Tensor:
    """Return images of which one holds a NaN."""
    return torch.cat([images(), torch.full((1, 1, 8, 8), torch.nan)])


def no_images() -> list[Tensor]:
    """Return an empty list."""
    return []


def failing_loader() -> Iterator[Tensor]:
    """Fail after the first batch."""
    yield images(4)
    raise RuntimeError("disk went away")


@cache
def small_result(target: str = "reference", budget: float | None = 5.0, network: str = "small") -> Result:
    """Return the network quantized to this many bits on average, made once per test run."""
    limit = None if budget is None else Budget(average_bits=budget)
    model = {"small": small, "product": product}[network]()
    return fxquant.quantize(model, images(), limit, bits=(2, 4, 8), target=target, effort="fast", progress=False)
