from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.backends.int8 import DynamicLinear, lower_dynamic
from fxquant.backends.int8 import kernels as int8_kernels
from fxquant.capture import capture
from fxquant.core.run import first_tensor
from tests.models import MODELS, Composed
from tests.programs import captured


def rounded(x: Tensor) -> Tensor:
    """Return each row on its symmetric 8-bit grid."""
    step = x.double().abs().amax(dim=-1, keepdim=True) / 127
    return torch.round(x.double() / step) * step


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (1, 24), (2, 3, 24), (4, 1)])
def test_rows_and_output_channels_are_rounded_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], exact: bool
) -> None:
    if exact:
        monkeypatch.setattr(int8_kernels, "matmul_kernel_is_exact", lambda: False)
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(s, generator=generator) for s in (shape, (7, shape[-1]), (7,)))
    layer = DynamicLinear(weight, bias)
    assert layer.exact == exact or not int8_kernels.matmul_kernel_is_exact()
    expected = rounded(x) @ rounded(weight).t() + bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    without = DynamicLinear(weight, None)(x).double()
    torch.testing.assert_close(without, expected - bias.double(), rtol=1e-5, atol=1e-5)


def test_an_image_does_not_depend_on_those_beside_it() -> None:
    layer, x = DynamicLinear(torch.randn(3, 8), torch.zeros(3)), torch.randn(4, 8)
    assert torch.equal(layer(x)[:1], layer(torch.cat([x[:1], 100 * x[1:]]))[:1])


def test_zeros_stay_zeros() -> None:
    assert torch.equal(DynamicLinear(torch.zeros(3, 4), None)(torch.zeros(2, 4)), torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["residual", "attention", "shared"])
def test_every_linear_layer_of_a_graph_is_replaced(name: str) -> None:
    program, x = captured(name), MODELS[name].inputs(5)
    before = str(program.module.graph)
    made, layers = lower_dynamic(program.module)
    assert layers
    assert "aten.linear" not in str(made.graph)
    assert str(program.module.graph) == before
    with torch.no_grad():
        real, found = first_tensor(program.module(*x)), first_tensor(made(*x))
    assert 0 < float((found - real).abs().max()) < 0.05 * float(real.abs().max())


def test_a_layer_whose_weight_is_computed_stays() -> None:
    model = Composed(lambda m, x: nn.functional.linear(x, m.weight * 2.0), weight=nn.Parameter(torch.randn(3, 4)))
    made, layers = lower_dynamic(capture(model, (torch.randn(2, 4),)).module)
    assert layers == []
    assert "aten.linear" in str(made.graph)
