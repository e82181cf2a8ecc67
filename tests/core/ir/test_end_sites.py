"""The first and the last layers of a network: no other layer lies between them and an input or an output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.core.facts import Settings
from fxquant.core.ir import Sites, end_sites
from fxquant.flow import find_sites


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))


class _Chain(_Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + torch.relu(self.d(self.c(self.b(self.a(x).relu()))))
        return y


class _TwoInputs(_Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.d(self.c(self.a(x * 2) + self.b(y)))
        return z


class _TwoOutputs(_Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.b(self.a(x))
        return self.c(y).mean((2, 3)), self.d(y)


class _Sizes(_Net):
    """The number of images is read in the middle of the network, and its pixels at the end."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.a(x)).reshape(len(x), 2, 2, 16).reshape(len(x), 4, 4, 4))
        z: Tensor = self.d(y).reshape(len(x), 4, -1)
        return z * len(x)


class _Alone(_Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y


@pytest.mark.parametrize(
    ("model", "names"),
    [(_Chain(), "ad"), (_TwoInputs(), "abd"), (_TwoOutputs(), "acd"), (_Sizes(), "ad"), (_Alone(), "a")],
    ids=["chain", "two inputs", "two outputs", "sizes", "alone"],
)
def test_ends(model: nn.Module, names: str) -> None:
    images = torch.rand(2, 4, 4, 4)
    given = (images, images) if isinstance(model, _TwoInputs) else (images,)
    program = find_sites(fxquant.capture(model, [given]), Settings())
    assert end_sites(program.module.graph, program[Sites].sites) == tuple(names)
