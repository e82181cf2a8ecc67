"""Estimators against their published formulas, written out on a linear network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxquant.passes.sensitivity import ESTIMATORS, hawq, label_cotangents
from tests.passes.sensitivity.linear import Linear, answer, answer_hessian, layer, split_scorer

LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def first_order(known: Linear) -> Tensor:
    return known.x @ known.dw.T + known.dx @ known.weight.T


def fit(known: Linear, v: Tensor) -> Tensor:
    of_weight = v.square().sum(1) * known.x.square().sum(1)
    of_value = (v @ known.weight).square().sum(1)
    return of_weight * known.dw.square().mean() / 2 + of_value * known.dx.square().mean() / 2


def fisher_out(known: Linear, v: Tensor) -> Tensor:
    # The op as it will run: the rounded weight times the rounded value.
    shift = (known.x + known.dx) @ (known.weight + known.dw).T - known.x @ known.weight.T
    return (v * shift).square().sum(1) / 2


def mpqco(known: Linear, v: Tensor) -> Tensor:
    return (v * first_order(known)).sum(1).square() / 2


@pytest.mark.parametrize(
    ("formula", "loss"), [(fit, "kl"), (fit, "mse"), (fisher_out, "kl"), (mpqco, "ce"), (mpqco, "kl"), (mpqco, "mse")]
)
def test_samples_of_every_image(formula: Callable[[Linear, Tensor], Tensor], loss: str) -> None:
    each = split_scorer(6, loss, LABELS)
    found = ESTIMATORS[formula.__name__](each)
    if loss == "ce":
        v = torch.eye(5, dtype=torch.float64)[LABELS] - torch.softmax(answer(each), dim=1)
    else:
        v = torch.cat([label_cotangents(each, batch, each.base(batch).answer) for batch in each.batches]).double()
    for column in range(len(each.columns)):
        samples = formula(layer(each, column), v)
        assert found.values[column, column] == pytest.approx(float(samples.mean()), rel=1e-3)
        assert found.stderr[column, column] == pytest.approx(float(samples.std()) / 6**0.5, rel=1e-3)


def trace_times_noise(known: Linear, hessian: Tensor) -> float:
    # In the weight the Hessian of an image is (Hessian in the answer) x (x x'), in x it is W' H W.
    of_weight = (torch.einsum("nii->n", hessian) * known.x.square().sum(1)).mean() * known.dw.square().mean()
    of_value = torch.einsum("oi,nop,pi->n", known.weight, hessian, known.weight).mean() * known.dx.square().mean()
    return float(of_weight + of_value) / 2


def loss_of_the_shift(known: Linear, hessian: Tensor) -> float:
    shift = first_order(known)
    return float(torch.einsum("ni,nij,nj->n", shift, hessian, shift).mean()) / 2


@pytest.mark.parametrize(
    ("estimator", "loss", "images", "expected", "precision"),
    [
        ("hawq", "kl", 6, trace_times_noise, 0.1),
        ("hawq", "mse", 6, trace_times_noise, 0.1),
        ("hawq", "ce", 6, trace_times_noise, 0.2),
        ("fit", "kl", 400, trace_times_noise, 0.1),
        ("mpqco", "kl", 2048, loss_of_the_shift, 1.0),
        ("mpqco", "mse", 2048, loss_of_the_shift, 1.0),
    ],
)
def test_over_many_samples(
    estimator: str,
    loss: str,
    images: int,
    expected: Callable[[Linear, Tensor], float],
    precision: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hawq, "PROBES", 700)
    each = split_scorer(images, loss, LABELS if images == 6 else None)
    each.batch = min(images, 1024)
    found, hessian = ESTIMATORS[estimator](each), answer_hessian(each)
    measured = ESTIMATORS["diagonal"](each) if estimator == "mpqco" else None
    for column in range(len(each.columns)):
        value = expected(layer(each, column), hessian)
        assert abs(found.values[column, column] - value) < 4 * found.stderr[column, column]
        assert found.stderr[column, column] < precision * value
        if measured is not None and each.columns[column].weight_bits == 8:
            assert measured.values[column, column] == pytest.approx(value, rel=0.1)


@pytest.mark.parametrize(
    ("estimator", "least", "most"), [("fit", 3, 3), ("hawq", 34, 34), ("fisher_out", 2, 6), ("mpqco", 2, 6)]
)
def test_passes_for_each_image(estimator: str, least: float, most: float) -> None:
    assert 4 * least - 1e-6 <= ESTIMATORS[estimator](split_scorer(4)).evaluations <= 4 * most + 1e-6
