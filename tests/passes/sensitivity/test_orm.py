from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.core.ir import Sites
from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import ESTIMATORS, Scorer, jackknife_error, orthogonality, unbiased_hsic
from tests.scoring import inputs, scorer, simulated

orm = ESTIMATORS["orm"]


def likeness(*features: Tensor) -> Tensor:
    """Return the matrix of debiased CKA of features, each of shape (images, features)."""
    hsic = unbiased_hsic(torch.stack([x @ x.T for x in features]))
    return hsic / torch.outer(hsic.diag(), hsic.diag()).sqrt()


def random_features(seed: int, count: int, *sizes: int) -> list[Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return [torch.randn(count, size, generator=stream, dtype=torch.float64) for size in sizes]


def test_three_layers_by_hand() -> None:
    x, y = torch.tensor([[1.0], [1], [0], [0]]).double(), torch.tensor([[1.0], [0], [1], [0]]).double()
    # U-centred: 1/3 at the pair of equal images and at its complement, -1/6 elsewhere.
    hsic = unbiased_hsic(torch.stack([x @ x.T, y @ y.T, 9 * x @ x.T]))
    expected = torch.tensor([[2.0, -1, 18], [-1, 2, -9], [18, -9, 162]]).double() / 12
    torch.testing.assert_close(hsic, expected)
    # gamma = (1/2, -1, 1/2)
    low, high = math.exp(-0.5), math.exp(1.0)
    np.testing.assert_allclose(orthogonality(hsic.numpy()), [(2 * low + high) / 3, (low + high) / 2, low])


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), count=st.integers(5, 20))
@settings(max_examples=30, deadline=None)
def test_likeness_is_invariant_to_rotation_scale_and_shift_and_to_nothing_more(
    seed: int, scale: float, count: int
) -> None:
    x, y, square, shift = random_features(seed, count, 7, 3, 7, 7)
    if count < 7:
        square = torch.randn(7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotation, _ = torch.linalg.qr(square[:7])
    moved = scale * (x @ rotation + shift[0])
    before, after = likeness(x, y), likeness(x, y, moved)
    torch.testing.assert_close(after[2, 1], before[0, 1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(after[2, 0], torch.ones(()).double(), rtol=1e-6, atol=0)
    assert float((likeness(x * torch.arange(1, 8), y) - before).abs().max()) > 1e-6


def test_independent_features_are_not_alike() -> None:
    found = torch.stack([likeness(*random_features(seed, 32, 60, 60))[0, 1] for seed in range(200)])
    assert abs(float(found.mean())) < 4 * float(found.std()) / 200**0.5 < 0.02
    x, y = (f - f.mean(dim=0) for f in random_features(0, 32, 60, 60))
    biased = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    assert biased > 0.6


def test_hsic_has_the_right_mean_over_small_batches() -> None:
    x, y = random_features(1, 400, 4, 4)
    y = x + y
    whole = unbiased_hsic(torch.stack([x @ x.T, y @ y.T]))
    parts = [
        unbiased_hsic(torch.stack([f @ f.T for f in pair]))
        for pair in zip(torch.split(x, 8), torch.split(y, 8), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(dim=0), whole, rtol=0.15, atol=0.0)


def song(k: Tensor, kk: Tensor) -> float:
    """Return the unbiased HSIC as Song et al. write it, with traces and sums."""
    n = len(k)
    k, kk = k - torch.diag(k.diag()), kk - torch.diag(kk.diag())
    both = (k @ kk).trace() + k.sum() * kk.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ kk).sum()
    return float(both) / (n * (n - 3))


def features_of(each: Scorer) -> list[list[Tensor]]:
    """Return the answers of the network's layers for each batch of the metric: 20 images are two tens."""
    made = []
    for images in each.images.batches(10):
        _, environment = each.replay.forward(images.inputs, each.off)
        nodes = [each.replay.by_name[site.nodes[0]] for site in each.program[Sites].sites]
        made.append([environment[node].detach().double().flatten(1) for node in nodes])
    return made


def test_prices_of_a_network_from_its_layers() -> None:
    each = scorer(simulated("plain"), CalibrationSet(inputs("plain", 20)))
    found = orm.measure(each)
    hsic = np.zeros((4, 4))
    for features in features_of(each):
        grams = [f @ f.T for f in features]
        hsic += np.array([[song(k, kk) for kk in grams] for k in grams])
    expected = orthogonality(hsic)
    names = [site.name for site in each.program[Sites].sites]
    for k, column in enumerate(each.columns):
        assert column.weight_bits is not None
        price = expected[names.index(column.owner)]
        assert found.values[k, k] == pytest.approx(price * (32 - column.weight_bits + 32 - 8), rel=1e-6)
    assert found.evaluations == pytest.approx(20)
    assert (np.diag(found.stderr) > 0).all()


def test_values_that_several_layers_read_cost_the_sum_of_their_prices() -> None:
    images = CalibrationSet(inputs("plain", 6))
    each = scorer(simulated("plain", (2, 4, 8), (4, 8)), images)
    values = {
        (c.owner, c.weight_bits, c.activation_bits): v
        for c, v in zip(each.columns, np.diag(orm.measure(each).values), strict=True)
    }
    price = {name: values[name, 8, None] / 24 for name in ("conv2", "conv3")}
    assert values["tie relu", None, 4] == pytest.approx(28 * (price["conv2"] + price["conv3"]))


def test_fewer_images_than_the_estimator_needs_leave_equal_prices() -> None:
    found = orm(scorer(simulated("plain"), CalibrationSet(inputs("plain", 3))))
    assert len(set(np.round(np.diag(found.values), 9))) == 3
    assert np.isnan(np.diag(found.stderr)).all()


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    samples = np.random.default_rng(0).normal(size=12)
    without = np.array([np.delete(samples, k).mean() for k in range(12)])
    assert jackknife_error(without) == pytest.approx(samples.std(ddof=1) / 12**0.5)
