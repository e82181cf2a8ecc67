from __future__ import annotations

import pytest
import torch

from fxquant.core.run import LOSSES
from fxquant.passes.sensitivity import generator, image_generators, loss_gradient, stream_of
from tests.passes.sensitivity.linear import answer, split_scorer


@pytest.mark.parametrize("loss", ["kl", "ce", "mse"])
def test_the_gradient_is_that_of_the_loss(loss: str) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    each = split_scorer(6, loss, labels)
    each.batch = 6
    (part,) = each.parts
    reference = answer(each)
    point = reference + torch.linspace(-1, 1, reference.numel(), dtype=torch.float64).view_as(reference)
    found = loss_gradient(each, part, point.requires_grad_(), reference)
    step = torch.randn(point.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    up, down = (LOSSES[loss](reference, point.detach() + h * step, labels) for h in (1e-5, -1e-5))
    torch.testing.assert_close((found * step).sum(1), (up - down) / 2e-5, rtol=1e-5, atol=1e-8)
    assert point.grad is None


def test_at_the_reference_the_gradient_is_zero() -> None:
    each = split_scorer(6)
    reference = answer(each)[:4]
    assert float(loss_gradient(each, each.parts[0], reference, reference).abs().max()) < 1e-7


def test_draws_belong_to_images_whatever_the_batch() -> None:
    whole, split = split_scorer(6), split_scorer(6)
    whole.batch, split.batch = 6, 4
    one, two = (
        [int(g.initial_seed()) for part in each.parts for g in image_generators(each, part, 5, first=1)]
        for each in (whole, split)
    )
    assert one == two == [5 * 1_000_003 + 1 + k for k in range(6)]
    assert generator(5, 0).initial_seed() not in one


def test_streams_of_other_seeds_and_samples_differ() -> None:
    each, other = split_scorer(2), split_scorer(2)
    other.seed = 1
    assert len({stream_of(s, k) for s in (each, other) for k in range(20)}) == 40
