from __future__ import annotations

import pytest
import torch

from fxquant.passes.sensitivity import ESTIMATORS, label_cotangents
from tests.passes.sensitivity.linear import answer_hessian, layer, split_scorer

fit = ESTIMATORS["fit"]


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_squared_gradients_of_a_linear_network_in_closed_form(loss: str) -> None:
    each = split_scorer(6, loss)
    found = fit(each)
    v = torch.cat([label_cotangents(each, part, each.base(part).answer) for part in each.parts]).double()
    for column in range(len(each.columns)):
        known = layer(each, column)
        of_weight = v.square().sum(1) * known.x.square().sum(1)
        of_value = (v @ known.weight).square().sum(1)
        samples = of_weight * known.dw.square().mean() / 2 + of_value * known.dx.square().mean() / 2
        assert found.values[column, column] == pytest.approx(float(samples.mean()), rel=1e-4)
        assert found.stderr[column, column] == pytest.approx(float(samples.std()) / 6**0.5, rel=1e-4)


def test_over_many_images_it_is_the_trace_of_the_hessian() -> None:
    each = split_scorer(400)
    each.batch = 200
    found, hessian = fit(each), answer_hessian(each)
    for column in range(len(each.columns)):
        known = layer(each, column)
        of_weight = (torch.einsum("nii->n", hessian) * known.x.square().sum(1)).mean() * known.dw.square().mean()
        of_value = torch.einsum("oi,nop,pi->n", known.weight, hessian, known.weight).mean() * known.dx.square().mean()
        expected = float(of_weight + of_value) / 2
        assert abs(found.values[column, column] - expected) < 4 * found.stderr[column, column]
        assert found.stderr[column, column] < 0.1 * expected


def test_the_cost_is_counted() -> None:
    assert fit(split_scorer(4)).evaluations == pytest.approx(4 * 3)
