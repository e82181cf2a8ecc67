"""Models whose forward writes to their weights: captured with the values of the call, or refused, never with others."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.core.errors import CaptureError


class Branches(nn.Module):
    """Two convolutions that a way of writing joins to one at every call."""

    def __init__(self, way: Callable[[Branches], Tensor]) -> None:
        super().__init__()
        self.way = way
        self.wide, self.narrow = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(3, 8, 1, bias=False)
        self.joined = nn.Conv2d(3, 8, 3, padding=1, bias=False)

    def weight(self) -> Tensor:
        return self.wide.weight + F.pad(self.narrow.weight, (1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.way(self), padding=1)


def _data(m: Branches) -> Tensor:
    m.joined.weight.data = m.weight().detach()
    return m.joined.weight


def _data_of_data(m: Branches) -> Tensor:
    m.joined.weight.data = m.wide.weight.data.clone() + F.pad(m.narrow.weight.data, (1, 1, 1, 1))
    return m.joined.weight


def _data_in_place(m: Branches) -> Tensor:
    m.joined.weight.data.copy_(m.weight())
    return m.joined.weight


def _clamped(m: Branches) -> Tensor:
    m.wide.weight.data.clamp_(-0.1, 0.1)
    return m.wide.weight


def _binary(m: Branches) -> Tensor:
    m.wide.weight.data = m.wide.weight.data.sign()
    return m.wide.weight


def _in_place(m: Branches) -> Tensor:
    with torch.no_grad():
        m.joined.weight.copy_(m.weight())
    return m.joined.weight


def _parameter(m: Branches) -> Tensor:
    m.joined.weight = nn.Parameter(m.weight())
    return m.joined.weight


def _unread(m: Branches) -> Tensor:
    m.joined.weight.data = m.wide.weight.detach() * 2
    return m.narrow.weight.expand(-1, -1, 3, 3)


def network(way: Callable[[Branches], Tensor]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Branches(way), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


@pytest.mark.parametrize(
    ("way", "name"),
    [
        (_data, "0.joined.weight"),
        (_data_of_data, "0.joined.weight"),
        (_data_in_place, "0.joined.weight"),
        (_clamped, "0.wide.weight"),
        (_binary, "0.wide.weight"),
    ],
)
def test_a_weight_that_is_written_through_data_is_named(way: Callable[[Branches], Tensor], name: str) -> None:
    with pytest.raises(CaptureError, match=f"forward writes to weight '{name}' at every call.*call the model once"):
        capture(network(way), (torch.randn(2, 3, 8, 8),))


@pytest.mark.parametrize("way", [_in_place, _parameter, _unread])
def test_what_export_records_is_captured(way: Callable[[Branches], Tensor]) -> None:
    model, x = network(way), torch.randn(5, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = capture(model, (x[:2],))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(program.module(x), copy.deepcopy(model)(x), atol=1e-5, rtol=1e-5)


def test_with_the_finished_layer_in_its_place_it_is_captured() -> None:
    """What the message says."""
    model, x = network(_data), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    assert isinstance(model[0], Branches)
    model[0] = model[0].joined
    with torch.no_grad():
        torch.testing.assert_close(capture(model, (x[:2],)).module(x), expected, atol=1e-5, rtol=1e-5)
