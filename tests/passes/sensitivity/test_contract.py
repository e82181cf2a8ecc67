"""What every registered estimator promises, whatever it measures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, SensitivityMatrix
from fxquant.core.ir import Choice, Sites
from fxquant.core.run import UNITS, CalibrationSet, GraphReplay
from fxquant.core.storage import ScoreStore
from fxquant.passes.sensitivity import ESTIMATORS, FLOAT_ONLY, Scorer
from tests.scoring import columns, full_forward_losses, inputs, scorer, simulated

NETS = ["plain", "shared", "two_inputs"]

MEASURED_DIAGONAL = {"diagonal", "gram", "hybrid", "monotone", "pairs", "shrunk"}
"""Estimators whose diagonal is the measured loss of one substitution, its standard error the images'."""

WITHOUT_IMAGES = {"weight_mse"}
"""Estimators that run nothing."""

SPREAD_OVER_PROBES = {"hawq"}
"""Estimators whose standard error is known from one image."""

OWN_UNIT = {"coverage", "path", "sqnr", "weight_mse"}
"""Estimators that are not in units of the loss."""

WITHOUT_PAIRS = FLOAT_ONLY | {"diagonal"}
"""Estimators of diagonal matrices."""

MAY_LOSE_PAIRS = {"monotone", "shrunk"}
"""Estimators that may find no pair worth keeping."""

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
    assert (found.evaluations > 0) == (estimator not in WITHOUT_IMAGES)
    assert np.isfinite(found.values).all()
    assert np.array_equal(found.values, found.values.T)
    sites = np.array([c.site for c in found.candidates])
    within = (sites[:, None] == sites[None, :]) & ~np.eye(len(sites), dtype=bool)
    assert within.any()
    assert not found.values[within].any()
    assert found.stderr.shape == found.values.shape
    assert (found.stderr >= 0).all()
    assert (found.unit == UNITS[loss]) == (estimator not in OWN_UNIT)
    between = sites[:, None] != sites[None, :]
    assert found.values[between].any() == (estimator not in WITHOUT_PAIRS) or estimator in MAY_LOSE_PAIRS
    narrowest = {site: found.candidates[list(sites).index(site)].choice for site in found.sites}
    assert found.predict(narrowest) > 0
    for column, candidate in enumerate(found.candidates):
        measured = float(full_forward_losses(name, images(name), loss, candidate).mean())
        same = found.values[column, column] == pytest.approx(measured, rel=1e-4, abs=1e-10)
        assert same or estimator not in MEASURED_DIAGONAL


@pytest.mark.parametrize("estimator", sorted(MEASURED_DIAGONAL))
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
    if estimator in WITHOUT_IMAGES | SPREAD_OVER_PROBES:
        assert np.isfinite(found.stderr).all()
        return
    assert np.isnan(np.diag(found.stderr)).all()
    sites = np.array([c.site for c in found.candidates])
    between = found.stderr[sites[:, None] != sites[None, :]]
    assert estimator in WITHOUT_PAIRS or np.isnan(between).all()


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

    monkeypatch.setattr(GraphReplay, "forward", refuse)
    monkeypatch.setattr(GraphReplay, "replay", refuse)
    second = ESTIMATORS[estimator](again)
    assert same(first, second)
    assert first.evaluations == second.evaluations


@every_estimator
def test_cross_entropy_with_labels(estimator: str) -> None:
    labelled = CalibrationSet(inputs("plain", 6), torch.tensor([0, 1, 2, 3, 0, 1]))
    found = ESTIMATORS[estimator](scorer(simulated("plain"), labelled, "ce"))
    assert (found.unit == "cross-entropy nats") == (estimator not in OWN_UNIT)
    assert np.isfinite(found.values).all()


@every_estimator
def test_several_activation_widths(estimator: str) -> None:
    program = simulated("plain", (2, 8), (2, 8))
    found = ESTIMATORS[estimator](scorer(program, images("plain")))
    assert found.candidates == columns(program)

    def predicted(weight_bits: int, activation_bits: int) -> float:
        return found.predict(dict.fromkeys(found.sites, Choice(weight_bits, activation_bits)))

    # Fewer bits cost more, of weights as of activations.
    assert predicted(2, 8) > predicted(8, 8) > 0
    assert predicted(8, 2) > predicted(8, 8)


@every_estimator
def test_a_context_works_or_is_refused(estimator: str) -> None:
    program = simulated("plain")
    plan = {site.name: Choice(4, 8) for site in program[Sites].sites}
    each = Scorer(program, images("plain"), "kl", ScoreStore(None, {}), context=BitAllocation(plan))
    if estimator in FLOAT_ONLY:
        with pytest.raises(OptionError, match=f"'{estimator}' is defined around the float network only"):
            ESTIMATORS[estimator](each)
        return
    found = ESTIMATORS[estimator](each)
    assert found.constant > 0
    assert found.predict(plan) == pytest.approx(found.constant)
    assert found.predict(plan | {"conv1": Choice(8, 8)}) != found.predict(plan | {"conv1": Choice(2, 8)})
