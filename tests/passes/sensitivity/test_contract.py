"""What every registered estimator promises, whatever it measures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant.core.data import CalibrationSet
from fxquant.core.score_store import ScoreStore
from fxquant.core.sensitivity import SensitivityMatrix
from fxquant.passes.sensitivity import ESTIMATORS
from fxquant.passes.sensitivity.scorer import Scorer
from tests.scoring import columns, full_forward_losses, inputs, scorer, simulated

NETS = ["plain", "shared", "two_inputs"]
every_estimator = pytest.mark.parametrize("estimator", sorted(ESTIMATORS))


def images(name: str, count: int = 6) -> CalibrationSet:
    return CalibrationSet(inputs(name, count))


def same(one: SensitivityMatrix, other: SensitivityMatrix) -> bool:
    return np.array_equal(one.values, other.values) and np.array_equal(one.stderr, other.stderr, equal_nan=True)


@every_estimator
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_the_matrix_is_what_its_type_says(estimator: str, name: str, loss: str) -> None:
    program = simulated(name)
    found = ESTIMATORS[estimator](scorer(program, images(name), loss))
    assert found.candidates == columns(program)
    assert found.estimator == estimator
    assert found.evaluations > 0
    assert np.array_equal(found.values, found.values.T)
    sites = np.array([c.site for c in found.candidates])
    within = (sites[:, None] == sites[None, :]) & ~np.eye(len(sites), dtype=bool)
    assert within.any()
    assert not found.values[within].any()
    assert found.stderr.shape == found.values.shape
    assert (found.stderr >= 0).all()
    for column, candidate in enumerate(found.candidates):
        measured = float(full_forward_losses(name, images(name), loss, candidate).mean())
        assert found.values[column, column] == pytest.approx(measured, rel=1e-4, abs=1e-10)


@every_estimator
def test_the_diagonal_of_the_standard_errors(estimator: str) -> None:
    found = ESTIMATORS[estimator](scorer(simulated("plain"), images("plain")))
    for column, candidate in enumerate(found.candidates):
        losses = full_forward_losses("plain", images("plain"), "kl", candidate)
        expected = float(losses.std()) / len(losses) ** 0.5
        assert found.stderr[column, column] == pytest.approx(expected, rel=1e-3, abs=1e-10)


@every_estimator
def test_leaving_a_site_in_float_costs_nothing(estimator: str) -> None:
    found = ESTIMATORS[estimator](scorer(simulated("plain", (4, 32)), images("plain")))
    floats = [k for k, c in enumerate(found.candidates) if c.choice.is_float]
    assert len(floats) == 4
    assert not found.values[floats].any()
    assert found.values[[k for k in range(len(found.candidates)) if k not in floats]].any()


@every_estimator
def test_one_image_has_no_standard_error(estimator: str) -> None:
    found = ESTIMATORS[estimator](scorer(simulated("plain"), images("plain", 1)))
    assert np.isnan(np.diag(found.stderr)).all()
    sites = np.array([c.site for c in found.candidates])
    between = found.stderr[sites[:, None] != sites[None, :]]
    assert estimator == "diagonal" or np.isnan(between).all()


@every_estimator
def test_the_same_numbers_again(estimator: str) -> None:
    program = simulated("plain")
    one, other = (ESTIMATORS[estimator](scorer(program, images("plain"))) for _ in range(2))
    assert same(one, other)
    assert one.evaluations == other.evaluations


@every_estimator
def test_the_size_of_batches_does_not_matter(estimator: str) -> None:
    program = simulated("plain")
    whole, split = scorer(program, images("plain")), scorer(program, images("plain"))
    whole.batch, split.batch = 6, 1
    one, other = (ESTIMATORS[estimator](each) for each in (whole, split))
    np.testing.assert_allclose(one.values, other.values, rtol=1e-3, atol=1e-8)
    np.testing.assert_allclose(one.stderr, other.stderr, rtol=1e-3, atol=1e-8)


@every_estimator
def test_finished_scores_are_not_measured_again(
    estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = simulated("plain")
    first = ESTIMATORS[estimator](scorer(program, images("plain"), store=ScoreStore(tmp_path, {"model": "a"})))
    again = scorer(program, images("plain"), store=ScoreStore(tmp_path, {"model": "a"}))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Scorer, "run", refuse)
    second = ESTIMATORS[estimator](again)
    assert same(first, second)
    assert first.evaluations == second.evaluations


@every_estimator
def test_cross_entropy_with_labels(estimator: str) -> None:
    labelled = CalibrationSet(inputs("plain", 6), torch.tensor([0, 1, 2, 3, 0, 1]))
    found = ESTIMATORS[estimator](scorer(simulated("plain"), labelled, "ce"))
    assert found.unit == "cross-entropy nats"
    assert np.isfinite(found.values).all()
