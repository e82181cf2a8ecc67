"""Modules that people write and tools trip over: quantized, exported, checked, saved and loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxquant
from fxquant.parity import check

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Pair(NamedTuple):
    """Scores with what they are made of, as many models return them."""

    features: Tensor | None
    scores: Tensor


class Base(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)

    def start(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(x))

    def end(self, y: Tensor) -> Tensor:
        scores: Tensor = self.out(self.two(y).mean((2, 3)))
        return scores


class Named(Base):
    def forward(self, x: Tensor) -> Pair:
        y = self.start(x)
        return Pair(None, self.end(y))


class Assigned(Base):
    """Parts of a value are assigned to, one of them broadcast."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x)
        z = self.two(y)
        z += y
        z[:, 0] = 0
        z[:, :, 0] = y[:, :, 1]
        z[:, 2:4, 2:4] = y[:, :1, :2]
        return self.end(z.clamp_(-1, 3))


class Rotary(Base):
    """Pairs of channels are turned as complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x).flatten(2).transpose(1, 2)
        pairs = torch.view_as_complex(y.reshape(-1, 64, 4, 2).contiguous())
        turns = torch.polar(torch.ones(64, 4), torch.outer(torch.arange(64.0), torch.tensor([1.0, 0.1, 0.01, 0.001])))
        turned = torch.view_as_real(pairs * turns).flatten(2).transpose(1, 2).reshape(-1, 8, 8, 8)
        return self.end(turned)


class Spectral(Base):
    """A Fourier neural operator: low frequencies are mixed by complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 8, 3, 3, dtype=torch.cfloat) / 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x)
        waves = torch.fft.rfft2(y)
        mixed = torch.zeros(len(y), 8, 8, 5, dtype=torch.cfloat)
        mixed[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", waves[:, :, :3, :3], self.mix)
        return self.end(F.gelu(torch.fft.irfft2(mixed, s=(8, 8)) + y))


class Phase(Base):
    """Complex numbers are scaled by one and taken apart again."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.start(x)
        z = torch.complex(y[:, :4], y[:, 4:]) * torch.exp(torch.tensor(0.3j))
        return self.end(torch.cat([z.real, z.imag], 1)), z.abs().mean((2, 3))


class Empty(Base):
    """Nothing is joined with something."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.start(x)
        z = torch.cat([y[:, :0], self.two(y), y[:, 8:]], 1)
        return self.end(z), z[:, :, :0].sum((1, 2, 3))


class Ranked(Base):
    """The largest values of each channel stay: on a grid many of them are equal."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x).flatten(2)
        largest = y.argsort(2, descending=True)[..., :8]
        return self.end(torch.zeros_like(y).scatter(2, largest, y.gather(2, largest)).view(-1, 8, 8, 8))


KINDS = [Named, Assigned, Rotary, Spectral, Phase, Empty, Ranked]


def leaves(answer: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_road(
    kind: type[Base], tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    caplog.set_level(logging.WARNING)
    result = fxquant.quantize(model, IMAGES, "average_bits=6", effort="fast", progress=False)
    with torch.no_grad():
        expected, found = leaves(model(IMAGES[:5])), leaves(result.simulated(IMAGES[:5]))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0.1 * float(one.abs().max()) if one.any() else 0)
    _ = result.to_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    answers = session.run(None, {"x": IMAGES[:5].numpy()})
    if kind is not Ranked:
        for one, answer in zip(found, answers, strict=True):
            torch.testing.assert_close(torch.from_numpy(answer), one, rtol=0, atol=1e-4)
    parity = check(result)
    parity.require()
    # What the order of equal values decides is left out.
    assert kind is not Ranked or all(pair.edges < parity.edges for pair in parity.pairs)
    again = fxquant.load(result.save(tmp_path / "saved"))
    for one, other in zip(found, leaves(again.simulated(IMAGES[:5])), strict=True):
        assert torch.equal(one, other)
    assert capfd.readouterr().err == ""
    assert not caplog.records
