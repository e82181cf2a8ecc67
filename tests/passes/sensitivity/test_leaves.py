from __future__ import annotations

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from fxquant.core.facts import WeightGrids
from fxquant.core.ir import FakeQuantize, Sites, tensor_at
from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import Leaves, activation_noise, rounded_values, weight_noise
from tests.scoring import inputs, plain_net, scorer, simulated

IMAGES = CalibrationSet(inputs("plain", 6))


def test_gradients_are_those_of_the_network() -> None:
    leaves = Leaves(scorer(simulated("plain"), IMAGES), IMAGES)
    found = dict(zip(leaves.weights, leaves.gradients(leaves.answer.square().sum()), strict=False))
    network = plain_net()
    network(IMAGES.inputs[0]).square().sum().backward()
    assert list(found) == ["conv1", "conv2", "conv3", "fc"]
    for site, gradient in found.items():
        expected = network.get_parameter(f"{site}.weight").grad
        assert expected is not None
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_value_is_shifted_for_its_quantized_readers_only() -> None:
    each = scorer(simulated("residual"), CalibrationSet(inputs("residual", 3)))
    leaves = Leaves(each, each.images)
    assert list(leaves.shifts) == rounded_values(each)
    gradients = leaves.gradients(leaves.answer.sum())[len(leaves.weights) :]
    for name, gradient in zip(leaves.shifts, gradients, strict=True):
        step = 1e-2 * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2))
        source = each.base(each.batches[0]).environment
        with torch.no_grad():
            moved, _ = each.replay.replay(source, {**each.off, name: partial(torch.add, step)}, changed=[name])
        expected = float((moved - each.base(each.batches[0]).answer).double().sum())
        assert float((gradient * step).double().sum()) == pytest.approx(expected, rel=0.2, abs=2e-4)


def test_leaves_without_influence_have_gradient_0() -> None:
    leaves = Leaves(scorer(simulated("plain"), IMAGES), IMAGES)
    assert not any(
        gradient.any() for gradient in leaves.gradients(leaves.weights["fc"].sum() * 0 + leaves.answer.sum() * 0)
    )
    found = leaves.gradients(leaves.weights["fc"].sum())
    assert [bool(gradient.any()) for gradient in found[:4]] == [False, False, False, True]


def test_noise_by_hand() -> None:
    program = simulated("plain")
    each = scorer(program, IMAGES)
    found = weight_noise(each)
    names = [site.name for site in program[Sites].sites]
    for row, column in enumerate(each.columns):
        assert column.site is not None
        assert column.weight is not None
        grid = program[WeightGrids].at(column.site, column.weight)
        value = tensor_at(program.module, f"{column.site}.weight").detach()
        rounded = FakeQuantize(grid)(value)
        expected = np.zeros(4)
        expected[names.index(column.site)] = float((rounded - value).square().mean())
        np.testing.assert_allclose(found[row], expected, rtol=1e-5)


def test_noise_of_values_adds_up_over_batches() -> None:
    each = scorer(simulated("plain"), IMAGES)
    whole = Leaves(each, IMAGES)
    split = [Leaves(each, IMAGES.slice(*span)) for span in ((0, 4), (4, 6))]
    total = activation_noise(each, whole.environment, 6)
    parts = [activation_noise(each, leaves.environment, n) for leaves, n in zip(split, (4, 2), strict=True)]
    np.testing.assert_allclose(parts[0] + parts[1], total, rtol=1e-5)
    name = rounded_values(each)[0]
    column = next(k for k, c in enumerate(each.columns) if name in c.substitution)
    x = IMAGES.inputs[0]
    expected = (each.columns[column].substitution[name](x) - x).square().flatten(1).mean(1).sum()
    assert total[column, 0] == pytest.approx(float(expected), rel=1e-5)


def test_a_recorded_run_dies_with_its_last_reader() -> None:
    """Not when the collector comes by: each holds every value of the network and its graph."""
    gc.disable()
    try:
        leaves = Leaves(scorer(simulated("plain"), IMAGES), IMAGES)
        _ = leaves.gradients(leaves.answer.sum())
        kept = weakref.ref(leaves)
        del leaves
        assert kept() is None
    finally:
        gc.enable()
