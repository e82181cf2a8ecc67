from __future__ import annotations

import pytest
import torch

from fxquant.passes.sensitivity import ESTIMATORS, label_cotangents
from tests.passes.sensitivity.linear import answer, answer_hessian, layer, split_scorer

diagonal = ESTIMATORS["diagonal"]
mpqco = ESTIMATORS["mpqco"]


def test_with_true_labels_it_is_the_published_formula() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    each = split_scorer(6, "ce", labels)
    found = mpqco(each)
    slope = torch.eye(5, dtype=torch.float64)[labels] - torch.softmax(answer(each), dim=1)
    for column in range(len(each.columns)):
        known = layer(each, column)
        shift = known.x @ known.dw.T + known.dx @ known.weight.T
        samples = (slope * shift).sum(1).square() / 2
        assert found.values[column, column] == pytest.approx(float(samples.mean()), rel=1e-4)
        assert found.stderr[column, column] == pytest.approx(float(samples.std()) / 6**0.5, rel=1e-4)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_with_sampled_labels_it_is_the_loss_of_a_small_shift(loss: str) -> None:
    each = split_scorer(2048, loss)
    each.batch = 1024
    found, measured, hessian = mpqco(each), diagonal(each), answer_hessian(each)
    v = torch.cat([label_cotangents(each, part, each.base(part).answer) for part in each.parts]).double()
    for column in range(len(each.columns)):
        known = layer(each, column)
        shift = known.x @ known.dw.T + known.dx @ known.weight.T
        samples = (v * shift).sum(1).square() / 2
        expected = float(torch.einsum("ni,nij,nj->n", shift, hessian, shift).mean()) / 2
        assert found.values[column, column] == pytest.approx(float(samples.mean()), rel=1e-3)
        assert abs(found.values[column, column] - expected) < 4 * found.stderr[column, column]
        if each.columns[column].weight_bits == 8:
            assert measured.values[column, column] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_labels_do_not_depend_on_the_batch(loss: str) -> None:
    whole, split = split_scorer(6, loss), split_scorer(6, loss)
    whole.batch, split.batch = 6, 1
    one, other = (
        torch.cat([label_cotangents(each, part, each.base(part).answer) for part in each.parts])
        for each in (whole, split)
    )
    torch.testing.assert_close(one, other)
    reseeded = split_scorer(6, loss)
    reseeded.seed = 1
    assert not torch.equal(one[:4], label_cotangents(reseeded, reseeded.parts[0], answer(reseeded)[:4].float()))


def test_positions_have_labels_of_their_own_and_share_the_loss() -> None:
    each = split_scorer(6)
    maps = torch.randn(4, 5, 3, 2)
    found = label_cotangents(each, each.parts[0], maps)
    p = torch.softmax(maps, dim=1)
    hot = found * 6**0.5 + p
    assert torch.allclose(hot.sum(1), torch.ones(4, 3, 2), atol=1e-5)
    assert torch.allclose(hot.amax(1), torch.ones(4, 3, 2), atol=1e-5)
