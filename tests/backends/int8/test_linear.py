from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fxquant.backends.int8 import ACTIVATIONS, EXACT_KERNEL, ByteGrid, IntegerLinear, LinearEnd, OnFirstUse

SOURCE = ByteGrid(0.05, 77, 0, 255)


def _layer(end: LinearEnd, packed: bool = False, exact: bool = False) -> IntegerLinear:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-128, 128, (9, 20), generator=generator).to(torch.int8)
    return IntegerLinear(weight, torch.linspace(1e-4, 1e-3, 9), torch.linspace(-1, 1, 9), SOURCE, end, packed, exact)


def _input() -> Tensor:
    return torch.randint(0, 256, (3, 4, 20), generator=torch.Generator().manual_seed(2)).to(torch.uint8)


def _real(layer: IntegerLinear, x: Tensor) -> Tensor:
    """The definition, in float64."""
    assert layer.bias is not None
    sums = (x.double() - SOURCE.zero_point) @ layer.weight.double().t()
    return ACTIVATIONS[layer.end.activation](sums * SOURCE.scale * layer.scales.double() + layer.bias.double())


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("out", [None, ByteGrid(0.03, 11, 0, 255), ByteGrid(0.05, 3, 0, 63)])
@pytest.mark.parametrize("way", ["sums", "packed", "exact", "traced"])
def test_every_way_is_the_definition(way: str, out: ByteGrid | None, activation: str) -> None:
    # Dynamo gives up on a function that it has traced eight times, and runs it as it is.
    torch._dynamo.reset()
    layer = _layer(LinearEnd(out, activation), packed=way == "packed", exact=way == "exact")
    x = _input()
    real = _real(layer, x)
    made = (torch.compile(layer, backend="eager") if way == "traced" else layer)(x)
    assert made.shape == (3, 4, 9)
    if out is None:
        torch.testing.assert_close(made.double(), real, rtol=1e-5, atol=1e-5)
    else:
        expected = (torch.round(real / out.scale) + out.zero_point).clamp(out.low, out.high)
        assert made.dtype == torch.uint8
        assert (made.double() - expected).abs().max() <= 1
        assert ((made.double() - expected) != 0).double().mean() <= 0.03


def test_report_and_copies() -> None:
    layer = _layer(LinearEnd(None, "gelu"), packed=True)
    assert "gelu" in repr(layer)
    assert _layer(LinearEnd(None), exact=True).kernel == EXACT_KERNEL
    x = _input()
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_what_is_kept_for_a_tensor_belongs_to_it_alone_and_is_not_copied() -> None:
    weight = torch.ones(2)
    kept = OnFirstUse[str]()
    assert kept.of(weight) is None
    assert kept.keep(weight, "packed") == "packed"
    assert kept.of(weight) == "packed"
    assert kept.of(weight.clone()) is None
    assert copy.deepcopy(kept).of(weight) is None
    assert copy.copy(kept).of(weight) is None
