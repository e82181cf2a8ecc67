"""Gradients of losses, sampled labels, and random signs: none depends on how images are split into batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fxquant.core.run import LOSSES, CalibrationSet
from fxquant.passes.sensitivity import (
    ESTIMATORS,
    Batch,
    Leaves,
    generator,
    image_generators,
    label_cotangents,
    loss_gradient,
    probe,
    stream_of,
)
from tests.passes.sensitivity.linear import answer, split_scorer
from tests.scoring import inputs, scorer, simulated


@pytest.mark.parametrize("loss", ["kl", "ce", "mse"])
def test_the_gradient_is_that_of_the_loss(loss: str) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    each = split_scorer(6, loss, labels)
    each.batch = 6
    (batch,) = each.batches
    reference = answer(each)
    point = reference + torch.linspace(-1, 1, reference.numel(), dtype=torch.float64).view_as(reference)
    found = loss_gradient(each, batch, point.requires_grad_(), reference)
    step = torch.randn(point.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    up, down = (LOSSES[loss](reference, point.detach() + h * step, labels) for h in (1e-5, -1e-5))
    torch.testing.assert_close((found * step).sum(1), (up - down) / 2e-5, rtol=1e-5, atol=1e-8)
    assert point.grad is None


def test_at_the_reference_the_gradient_is_zero() -> None:
    each = split_scorer(6)
    reference = answer(each)[:4]
    assert float(loss_gradient(each, each.batches[0], reference, reference).abs().max()) < 1e-7


def test_draws_belong_to_images_whatever_the_batch() -> None:
    whole, split = split_scorer(6), split_scorer(6)
    whole.batch, split.batch = 6, 4
    one, two = (
        [int(g.initial_seed()) for batch in each.batches for g in image_generators(each, batch, 5, first=1)]
        for each in (whole, split)
    )
    assert one == two == [5 * 1_000_003 + 1 + k for k in range(6)]
    assert generator(5, 0).initial_seed() not in one


def test_streams_of_other_seeds_and_samples_differ() -> None:
    each, other = split_scorer(2), split_scorer(2)
    other.seed = 1
    assert len({stream_of(s, k) for s in (each, other) for k in range(20)}) == 40


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_labels_do_not_depend_on_the_batch(loss: str) -> None:
    whole, split = split_scorer(6, loss), split_scorer(6, loss)
    whole.batch, split.batch = 6, 1
    one, other = (
        torch.cat([label_cotangents(each, batch, each.base(batch).answer) for batch in each.batches])
        for each in (whole, split)
    )
    torch.testing.assert_close(one, other)
    reseeded = split_scorer(6, loss)
    reseeded.seed = 1
    assert not torch.equal(one[:4], label_cotangents(reseeded, reseeded.batches[0], answer(reseeded)[:4].float()))


def test_positions_have_labels_of_their_own_and_share_the_loss() -> None:
    each = split_scorer(6)
    maps = torch.randn(4, 5, 3, 2)
    found = label_cotangents(each, each.batches[0], maps)
    p = torch.softmax(maps, dim=1)
    hot = found * 6**0.5 + p
    assert torch.allclose(hot.sum(1), torch.ones(4, 3, 2), atol=1e-5)
    assert torch.allclose(hot.amax(1), torch.ones(4, 3, 2), atol=1e-5)


def test_probes_are_signs() -> None:
    each = split_scorer(3)
    batch = Batch(0, each.images)
    signs = probe(each, batch, Leaves(each, each.images), 0)
    assert all(torch.equal(v.abs(), torch.ones_like(v)) for v in signs)
    assert not any(torch.equal(v, v.abs()) for v in signs)


def test_probes_do_not_depend_on_the_batch_and_differ_by_sample_and_image() -> None:
    each = split_scorer(4)
    each.batch = 2
    whole = probe(each, Batch(0, each.images), Leaves(each, each.images), 3)
    second = each.images.slice(2, 4)
    half = probe(each, Batch(1, second), Leaves(each, second), 3)
    assert all(torch.equal(one, other) for one, other in zip(whole[:2], half[:2], strict=True))
    assert all(torch.equal(one[2:], other) for one, other in zip(whole[2:], half[2:], strict=True))
    other = probe(each, Batch(0, each.images), Leaves(each, each.images), 4)
    assert not any(torch.equal(one, two) for one, two in zip(whole, other, strict=True))
    assert not torch.equal(whole[2][0], whole[2][1])


def test_attention_can_be_differentiated_twice() -> None:
    each = scorer(simulated("attention"), CalibrationSet(inputs("attention", 2)))
    found = ESTIMATORS["hawq"](each)
    assert np.isfinite(found.values).all()
    assert found.values.any()
