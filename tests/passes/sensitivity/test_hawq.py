from __future__ import annotations

import numpy as np
import pytest
import torch

from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import ESTIMATORS, Leaves, Part, probe
from fxquant.passes.sensitivity import hawq as module
from tests.passes.sensitivity.linear import answer_hessian, layer, split_scorer
from tests.scoring import inputs, scorer, simulated

hawq = ESTIMATORS["hawq"]


@pytest.mark.parametrize("loss", ["kl", "mse", "ce"])
def test_traces_of_a_linear_network_in_closed_form(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBES", 1000)
    each = split_scorer(6, loss, torch.tensor([0, 1, 2, 3, 4, 0]))
    found, hessian = hawq(each), answer_hessian(each)
    for column in range(len(each.columns)):
        known = layer(each, column)
        # In the weight the Hessian of an image is (Hessian in the answer) x (x x'), in x it is W' H W.
        of_weight = float((torch.einsum("nii->n", hessian) * known.x.square().sum(1)).mean())
        of_value = float(torch.einsum("oi,nop,pi->n", known.weight, hessian, known.weight).mean())
        expected = of_weight * float(known.dw.square().mean()) / 2 + of_value * float(known.dx.square().mean()) / 2
        assert abs(found.values[column, column] - expected) < 4 * found.stderr[column, column]
        assert found.stderr[column, column] < (0.2 if loss == "ce" else 0.1) * expected


def test_probes_are_signs() -> None:
    each = split_scorer(3)
    part = Part(0, each.images)
    signs = probe(each, part, Leaves(each, each.images), 0)
    assert all(torch.equal(v.abs(), torch.ones_like(v)) for v in signs)
    assert not any(torch.equal(v, v.abs()) for v in signs)


def test_probes_do_not_depend_on_the_batch_and_differ_by_sample_and_image() -> None:
    each = split_scorer(4)
    each.batch = 2
    whole = probe(each, Part(0, each.images), Leaves(each, each.images), 3)
    second = each.images.slice(2, 4)
    half = probe(each, Part(1, second), Leaves(each, second), 3)
    assert all(torch.equal(one, other) for one, other in zip(whole[:2], half[:2], strict=True))
    assert all(torch.equal(one[2:], other) for one, other in zip(whole[2:], half[2:], strict=True))
    other = probe(each, Part(0, each.images), Leaves(each, each.images), 4)
    assert not any(torch.equal(one, two) for one, two in zip(whole, other, strict=True))
    assert not torch.equal(whole[2][0], whole[2][1])


def test_attention_can_be_differentiated_twice() -> None:
    each = scorer(simulated("attention"), CalibrationSet(inputs("attention", 2)))
    found = hawq(each)
    assert np.isfinite(found.values).all()
    assert found.values.any()


def test_the_cost_is_counted() -> None:
    each = split_scorer(4)
    assert hawq(each).evaluations == pytest.approx(4 * (2 + 2 * module.PROBES))
