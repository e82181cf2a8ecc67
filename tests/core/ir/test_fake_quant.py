from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.core.ir import FINEST_SHARE, FakeQuantize, Grid, QuantSpec, activation_spec, weight_spec


def test_gradient_is_one_inside_and_zero_outside() -> None:
    fake = FakeQuantize(Grid(activation_spec(8), torch.tensor(0.1), torch.tensor(10)))
    x = torch.tensor([-5.0, -0.5, 0.0, 3.0, 100.0], requires_grad=True)
    fake(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_channels_have_their_own_scale() -> None:
    spec = weight_spec(4, 1)
    scale = torch.tensor([0.1, 0.5, 1.0])
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    fake = FakeQuantize(Grid(spec, scale, torch.zeros(3, dtype=torch.int32)))
    expected = fake.grid.round_trip(x)
    assert torch.allclose(fake(x), expected, atol=1e-6)


def test_state_is_its_own_and_survives_a_round_trip() -> None:
    scale = torch.tensor(0.25, dtype=torch.float64)
    fake = FakeQuantize(Grid(activation_spec(4), scale, torch.tensor(3)))
    scale.fill_(9.0)
    assert fake.scale.dtype == torch.float32
    assert float(fake.scale) == 0.25
    assert fake.zero_point.dtype == torch.int32
    other = FakeQuantize(Grid(activation_spec(4), torch.tensor(1.0), torch.tensor(0)))
    other.load_state_dict(fake.state_dict())
    x = torch.linspace(-2, 2, 9)
    assert torch.equal(fake(x), other(x))
    assert "bits=4" in repr(fake)


def test_large_values_saturate_at_their_own_end() -> None:
    fake = FakeQuantize(Grid(activation_spec(8), torch.tensor(1e-3), torch.tensor(128)))
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
    fake = FakeQuantize(Grid(spec, torch.tensor(scale), torch.tensor(zero % 2**bits)))
    x = torch.tensor(values)
    expected = torch.fake_quantize_per_tensor_affine(x, fake.scale, fake.zero_point, spec.qmin, spec.qmax)
    before = x.clone()
    assert torch.equal(fake(x), expected)
    assert torch.equal(x, before)
    assert torch.equal(fake(x.requires_grad_()), expected)


CASES = [
    (activation_spec(4), torch.tensor(0.13), torch.tensor(5)),
    (activation_spec(8), torch.tensor(0.02), torch.tensor(0)),
]
CASES += [
    (weight_spec(bits, axis), torch.tensor([0.05, 0.3, 1.7]), torch.zeros(3, dtype=torch.int32))
    for bits, axis in ((2, 0), (4, 1), (8, 0))
]


def drawn(spec: QuantSpec) -> Tensor:
    shape = (3, 3, 20) if spec.channel_axis is not None else (200,)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(spec.bits))


def shaped(values: Tensor, spec: QuantSpec, dim: int) -> Tensor:
    """Return per-channel values so that they broadcast over a tensor of `dim` axes."""
    return (
        values
        if spec.channel_axis is None
        else values.reshape([-1 if k == spec.channel_axis else 1 for k in range(dim)])
    )


@pytest.mark.parametrize(("spec", "scale", "zero"), CASES)
def test_learning_changes_no_value(spec: QuantSpec, scale: Tensor, zero: Tensor) -> None:
    fake, x = FakeQuantize(Grid(spec, scale, zero)), drawn(spec)
    expected, keys = fake(x), set(fake.state_dict())
    fake.learn()
    assert isinstance(fake.scale, torch.nn.Parameter)
    assert set(fake.state_dict()) == keys
    assert torch.equal(fake(x), expected)
    with torch.no_grad():
        assert torch.equal(fake(x), expected)
    fake.learn(False)
    assert not list(fake.parameters())
    assert set(fake.state_dict()) == keys
    assert torch.equal(fake.scale, scale)
    assert torch.equal(fake(x), expected)


@given(
    st.integers(2, 8), st.floats(1e-6, 1e3), st.integers(0, 255), st.lists(st.floats(-1e4, 1e4, width=32), min_size=1)
)
def test_learning_changes_no_value_of_any_grid(bits: int, scale: float, zero: int, values: list[float]) -> None:
    fake, x = (
        FakeQuantize(Grid(activation_spec(bits), torch.tensor(scale), torch.tensor(zero % 2**bits))),
        torch.tensor(values),
    )
    expected = fake(x)
    fake.learn()
    assert torch.equal(fake(x), expected)


@pytest.mark.parametrize(("spec", "scale", "zero"), CASES)
def test_gradients_of_a_learned_step(spec: QuantSpec, scale: Tensor, zero: Tensor) -> None:
    fake, x = FakeQuantize(Grid(spec, scale, zero)), drawn(spec).requires_grad_()
    fake.learn()
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    torch.autograd.backward(fake(x), cotangent)
    y, z = x.detach().double(), shaped(zero.double(), spec, x.dim())
    step = shaped(scale.double(), spec, x.dim())
    # The straight-through estimator holds constant what rounding adds, and which side of the grid's ends a value lies.
    level = torch.round(y / step) + z
    inside, rest = (level >= spec.qmin) & (level <= spec.qmax), torch.round(y / step) - y / step

    def through(s: Tensor) -> Tensor:
        return torch.where(inside, y + rest * s, s * (level.clamp(spec.qmin, spec.qmax) - z))

    slope = (through(step * 1.001) - through(step * 0.999)) / (0.002 * step) * cotangent.double()
    over = [k for k in range(x.dim()) if k != spec.channel_axis]
    pace = (x.numel() / scale.numel() * spec.qmax) ** -0.5
    assert fake.scale.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(fake.scale.grad.double(), slope.sum(dim=over) * pace, rtol=1e-4, atol=1e-4)
    assert 0 < int(inside.sum()) < x.numel() or spec.bits == 8
    torch.testing.assert_close(x.grad, torch.where(inside, cotangent, 0.0))


def test_a_step_that_overshoots_stays_positive_and_comes_back() -> None:
    fake = FakeQuantize(Grid(weight_spec(4, 0), torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.int32)))
    fake.learn()
    with torch.no_grad():
        fake.scale[0] = -3.0
    x = torch.tensor([[0.7, -0.4], [0.7, -0.4]])
    assert torch.equal(fake.step.detach(), torch.tensor([0.1 * FINEST_SHARE, 0.2]))
    answer = fake(x)
    assert torch.isfinite(answer).all()
    torch.autograd.backward((answer - x).square().sum())
    assert fake.scale.grad is not None
    assert float(fake.scale.grad[0]) < 0
    fake.learn(False)
    assert float(fake.scale.min()) > 0
