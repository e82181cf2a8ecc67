from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.core.fake_quant import FakeQuantize
from fxquant.core.numerics import round_trip
from fxquant.core.spec import activation_spec, weight_spec


def test_gradient_is_one_inside_and_zero_outside() -> None:
    fake = FakeQuantize(activation_spec(8), torch.tensor(0.1), torch.tensor(10))
    x = torch.tensor([-5.0, -0.5, 0.0, 3.0, 100.0], requires_grad=True)
    fake(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_channels_have_their_own_scale() -> None:
    spec = weight_spec(4, 1)
    scale = torch.tensor([0.1, 0.5, 1.0])
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    fake = FakeQuantize(spec, scale, torch.zeros(3, dtype=torch.int32))
    expected = round_trip(x, scale, torch.zeros(3, dtype=torch.int32), spec)
    assert torch.allclose(fake(x), expected, atol=1e-6)


def test_state_is_its_own_and_survives_a_round_trip() -> None:
    scale = torch.tensor(0.25, dtype=torch.float64)
    fake = FakeQuantize(activation_spec(4), scale, torch.tensor(3))
    scale.fill_(9.0)
    assert fake.scale.dtype == torch.float32
    assert float(fake.scale) == 0.25
    assert fake.zero_point.dtype == torch.int32
    other = FakeQuantize(activation_spec(4), torch.tensor(1.0), torch.tensor(0))
    other.load_state_dict(fake.state_dict())
    x = torch.linspace(-2, 2, 9)
    assert torch.equal(fake(x), other(x))
    assert "bits=4" in repr(fake)


def test_large_values_saturate_at_their_own_end() -> None:
    fake = FakeQuantize(activation_spec(8), torch.tensor(1e-3), torch.tensor(128))
    low, high = fake(torch.tensor([-1e6, 1e6])).tolist()
    assert low < 0 < high


@given(
    st.integers(2, 8),
    st.floats(1e-6, 1e3),
    st.integers(0, 255),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
)
def test_without_gradient_the_same_to_the_bit(bits: int, scale: float, zero: int, values: list[float]) -> None:
    spec = activation_spec(bits)
    fake = FakeQuantize(spec, torch.tensor(scale), torch.tensor(zero % 2**bits))
    x = torch.tensor(values)
    expected = torch.fake_quantize_per_tensor_affine(x, fake.scale, fake.zero_point, spec.qmin, spec.qmax)
    before = x.clone()
    assert torch.equal(fake(x), expected)
    assert torch.equal(x, before)
    assert torch.equal(fake(x.requires_grad_()), expected)
