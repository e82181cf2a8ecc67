"""Probabilities over grid points, bits that are dropped, and the multi-class straight-through estimator, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxquant.core.ir import FakeQuantize, Grid, weight_spec
from fxquant.qat import ClusterPromoting, nearest_of_level, probability

VALUES = torch.linspace(-11.3, 9.7, 85)


def quantizer(bits: int, step: float, channels: int = 1) -> FakeQuantize:
    return FakeQuantize(
        Grid(weight_spec(bits), torch.full((channels,), step), torch.zeros(channels, dtype=torch.int32))
    )


def form(bits: int = 4, step: float = 0.5) -> ClusterPromoting:
    weight = (VALUES * step).reshape(1, -1)
    return ClusterPromoting(weight, quantizer(bits, step), 1e-3, 1e-3, 1e-2, seed=3)


def test_probabilities_of_all_points_add_up_to_one() -> None:
    every = torch.stack(
        [probability(VALUES, torch.full_like(VALUES, q), torch.tensor(0.4), -8, 7) for q in range(-8, 8)]
    )
    assert torch.allclose(every.sum(dim=0), torch.ones_like(VALUES), atol=1e-4)
    u, q, sigma = 0.3, 0.0, 0.5
    one = 1 / (1 + math.exp(-(0.5 - u) / sigma)) - 1 / (1 + math.exp(-(-0.5 - u) / sigma))
    whole = 1 / (1 + math.exp(-(1.5 - u) / sigma)) - 1 / (1 + math.exp(-(-2.5 - u) / sigma))
    found = probability(torch.tensor(u), torch.tensor(q), torch.tensor(sigma), -2, 1)
    assert float(found) == pytest.approx(one / whole, rel=1e-5)


def test_widths_share_the_points_out_among_them() -> None:
    bits, seen = 5, list[int]()
    for width in range(2, bits + 1):
        unit = 2 ** (bits - width)
        own = [q for q in range(-16, 16) if q % unit == 0 and (width == 2 or q % (2 * unit) == unit)]
        seen += own
        points = torch.tensor(own, dtype=torch.float32)
        distance = (VALUES[:, None] - points[None]).abs()
        found = nearest_of_level(VALUES, width, bits)
        assert torch.equal(distance.min(dim=1).values, (VALUES - found).abs())
        assert set(found.tolist()) <= {float(q) for q in own}
    assert sorted(seen) == list(range(-16, 16))


def test_with_all_bits_a_weight_goes_to_its_nearest_point() -> None:
    made = form()
    found = made.quantized(torch.ones(3)).detach()
    assert torch.equal(found, quantizer(4, 0.5)(made.weight()))


@pytest.mark.parametrize(("gates", "bits"), [([1.0, 0.0, 0.0], 2), ([1.0, 1.0, 0.0], 3)])
def test_without_its_finest_bits_the_grid_is_that_of_a_narrower_width(gates: list[float], bits: int) -> None:
    made = form()
    found = made.quantized(torch.tensor(gates)).detach()
    assert torch.equal(found, quantizer(bits, 0.5 * 2 ** (4 - bits))(made.weight()))


def test_the_slope_is_that_of_the_chosen_point_s_probability() -> None:
    made = form(bits=3, step=0.5)
    out = made.quantized(torch.tensor([1.0, 0.8]))
    along = torch.linspace(-1, 1, len(VALUES)).reshape(1, -1)
    torch.autograd.backward(out, along)
    q = out.detach() / 0.5
    assert made.latent.grad is not None

    def taken(weight: Tensor) -> Tensor:
        # Odd points belong to the third bit, whose gate is 0.8.
        share = torch.where(q.abs() % 2 == 1, 0.8, 1.0)
        return probability(weight / 0.5, q.double(), torch.tensor(1 / 3).double(), -4, 3) * share

    small = 1e-3
    weight = made.weight().double()
    slope = (taken(weight + small) - taken(weight - small)) / (2 * small)
    # Far beyond the ends probabilities are all but 0 over all but 0.
    near = (weight > -2.4) & (weight < 1.9)
    assert torch.allclose(made.latent.grad[near].double(), (along * 0.5 * q * slope)[near], atol=1e-3)
    # In the middle of a point nothing pulls, at its edge most does: weights gather.
    centre, edge = (taken(torch.tensor([[x]]).expand_as(q)) for x in (0.5, 0.72))
    assert float(centre[q == 1].mean()) > float(edge[q == 1].mean())


def test_gates_are_drawn_alike_for_one_seed_and_anew_for_each_step() -> None:
    one, other = form(), form()
    first, again = one.gates().detach(), other.gates().detach()
    assert torch.equal(first, again)
    draws = torch.stack([one.gates().detach() for _ in range(300)])
    assert bool((draws[:, 0] == 1).all())
    assert bool((draws >= 0).all())
    assert bool((draws <= 1).all())
    # A width is there only with all narrower ones.
    assert bool(((draws[:, 1] > 0) >= (draws[:, 2] > 0)).all())
    expected = one.chances_open().detach()
    shares = (draws > 0).double().mean(dim=0)
    assert torch.allclose(shares, expected.double(), atol=0.06)
    single = 1 / (1 + math.exp(-(2.2 - 2 / 3 * math.log(0.1 / 1.1))))
    assert expected.tolist() == pytest.approx([1.0, single, single**2], rel=1e-5)
