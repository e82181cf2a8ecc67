from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import ESTIMATORS, Batch, choose_pairs, slope, suffix_cost
from fxquant.passes.sensitivity import hybrid as module
from tests.scoring import inputs, scorer, simulated

gram = ESTIMATORS["gram"]
hybrid = ESTIMATORS["hybrid"]
monotone = ESTIMATORS["monotone"]
pairs = ESTIMATORS["pairs"]
Array = NDArray[np.float64]
IMAGES = CalibrationSet(inputs("plain", 6))


def as_it_is(_: object, values: Array) -> tuple[Array, Array]:
    return values, np.ones(len(values))


def test_with_budget_for_all_it_is_monotone_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAIRS_PER_SINGLE", 100.0)
    found, exact = (estimate(scorer(simulated("plain"), IMAGES)) for estimate in (hybrid, monotone))
    np.testing.assert_allclose(found.values, exact.values, rtol=1e-6, atol=1e-12)
    assert found.notes["measured_pairs"] == found.notes["all_pairs"] == 54


def test_without_budget_it_is_the_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "repaired", as_it_is)
    monkeypatch.setattr(module, "PAIRS_PER_SINGLE", 0.0)
    found, modelled = (estimate(scorer(simulated("plain"), IMAGES)) for estimate in (hybrid, gram))
    np.testing.assert_allclose(found.values, modelled.values, rtol=1e-6, atol=1e-12)
    assert found.notes["measured_pairs"] == 0


def test_the_largest_predictions_are_measured_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "repaired", as_it_is)
    monkeypatch.setattr(module, "PAIRS_PER_SINGLE", 1.0)
    found, exact = (estimate(scorer(simulated("plain"), IMAGES)) for estimate in (hybrid, pairs))
    modelled = gram(scorer(simulated("plain"), IMAGES))
    assert 0 < found.notes["measured_pairs"] < 54
    as_measured = np.isclose(found.values, exact.values, rtol=1e-6, atol=1e-12)
    np.fill_diagonal(as_measured, False)
    sites = np.array([c.site for c in found.candidates])
    between = sites[:, None] != sites[None, :]
    largest = np.argsort(-np.abs(np.where(np.triu(between), modelled.values, 0)).ravel())[:5]
    assert as_measured.ravel()[largest].all()
    # Each row's own run is paid for beside its pairs.
    singles = gram(scorer(simulated("plain"), IMAGES)).evaluations
    assert found.evaluations < 3.2 * singles


def test_it_reports_how_far_its_predictions_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAIRS_PER_SINGLE", 2.0)
    found, exact = (estimate(scorer(simulated("plain"), IMAGES)) for estimate in (hybrid, pairs))
    assert found.notes["sample_error"] > 0
    assert 0 < found.notes["sample_size_of_terms"] <= 2 * np.abs(exact.values).max()
    assert 0 <= found.notes["scale"] <= 1


@given(st.integers(2, 6), st.floats(0, 30), st.integers(0, 5))
def test_chosen_pairs_keep_the_budget(sites: int, budget: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = np.repeat(np.arange(sites), 2)
    between = names[:, None] != names[None, :]
    predicted = rng.normal(size=between.shape)
    cost = rng.uniform(0.1, 1.0, size=len(names))
    sample, chosen = choose_pairs(predicted + predicted.T, between, cost, budget, seed)
    both = sample | chosen
    assert not (sample & chosen).any()
    assert not (both & ~between).any()
    assert np.array_equal(both, both.T)
    price = np.minimum(cost[:, None], cost[None, :])
    assert np.triu(price * both).sum() <= budget + 1e-9


def test_the_slope_lies_between_zero_and_one() -> None:
    x = np.array([1.0, 2.0, 3.0])
    assert slope(x, 0.5 * x) == pytest.approx(0.5)
    assert slope(x, -x) == 0.0
    assert slope(x, 3 * x) == 1.0
    assert slope(np.zeros(3), x) == 1.0


def test_the_cost_of_a_column_is_what_its_run_takes() -> None:
    each = scorer(simulated("plain"), IMAGES)
    base = each.base(Batch(0, IMAGES)).environment
    each.take_spent(1)
    for k, column in enumerate(each.columns):
        each.run(base, k)
        assert suffix_cost(each, column) == pytest.approx(each.take_spent(1))
