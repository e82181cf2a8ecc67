"""What every registered estimator promises, and what each declares; the example of the documentation is one more."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, SensitivityMatrix
from fxquant.core.ir import Choice, Sites
from fxquant.core.run import UNITS, CalibrationSet, GraphReplay
from fxquant.core.storage import ScoreStore
from fxquant.passes.sensitivity import ESTIMATORS, Estimator, Scorer
from tests.scoring import full_forward_losses, inputs, scorer, simulated

PAGE = Path(__file__).parents[3] / "docs" / "add-an-estimator.md"
EXAMPLE = "power"


@pytest.fixture(params=[*sorted(ESTIMATORS), EXAMPLE])
def estimator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Estimator:
    """Every estimator, and that of the page, which is registered for the test alone."""
    if request.param == EXAMPLE:
        monkeypatch.setattr(ESTIMATORS, "_entries", dict(ESTIMATORS._entries))
        shown = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        assert shown is not None
        exec(compile(shown[1], str(PAGE), "exec"), {})
    return ESTIMATORS[request.param]


def images(name: str, count: int = 6) -> CalibrationSet:
    return CalibrationSet(inputs(name, count))


def between(found: SensitivityMatrix) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    sites = np.array([c.site for c in found.candidates])
    return np.asarray(sites[:, None] != sites[None, :])


def same(one: SensitivityMatrix, other: SensitivityMatrix) -> bool:
    arrays = np.array_equal(one.values, other.values) and np.array_equal(one.stderr, other.stderr, equal_nan=True)
    return arrays and one.evaluations == other.evaluations


@pytest.mark.parametrize("name", ["plain", "shared", "two_inputs"])
@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_the_matrix_is_what_its_type_says(estimator: Estimator, name: str, loss: str) -> None:
    program = simulated(name)
    found = estimator(scorer(program, images(name), loss))
    assert found.candidates == program[Sites].candidates
    assert found.estimator == estimator.name
    assert found.evaluations > 0 or not estimator.images
    assert np.isfinite(found.values).all()
    assert np.array_equal(found.values, found.values.T)
    within = ~between(found) & ~np.eye(len(found.candidates), dtype=bool)
    assert within.any()
    assert not found.values[within].any()
    assert found.stderr.shape == found.values.shape
    assert (found.stderr >= 0).all()
    assert found.unit == (UNITS[loss] if estimator.unit is None else estimator.unit)
    # On some networks a repair leaves no pair.
    assert found.values[between(found)].any() == estimator.has_pairs or (estimator.has_pairs and name != "plain")
    narrowest = {site: next(c.choice for c in found.candidates if c.site == site) for site in found.sites}
    assert found.predict(narrowest) > 0
    if not estimator.measured:
        return
    for column, candidate in enumerate(found.candidates):
        losses = full_forward_losses(name, images(name), loss, candidate)
        assert found.values[column, column] == pytest.approx(float(losses.mean()), rel=1e-4, abs=1e-10)
        spread = float(losses.std()) / len(losses) ** 0.5
        assert found.stderr[column, column] == pytest.approx(spread, rel=1e-3, abs=1e-10)


def test_leaving_a_site_in_float_costs_nothing(estimator: Estimator) -> None:
    found = estimator(scorer(simulated("plain", (4, 32)), images("plain")))
    floats = np.array([c.choice.is_float for c in found.candidates])
    assert floats.sum() == 4
    assert not found.values[floats].any()
    assert found.values[~floats].any()


def test_one_image_has_no_standard_error(estimator: Estimator) -> None:
    found = estimator(scorer(simulated("plain"), images("plain", 1)))
    if not estimator.images:
        assert np.isfinite(found.stderr).all()
        return
    assert np.isnan(np.diag(found.stderr)).all()
    assert not estimator.has_pairs or np.isnan(found.stderr[between(found)]).all()


def test_the_size_of_batches_does_not_matter(estimator: Estimator) -> None:
    program = simulated("plain")
    whole, split = scorer(program, images("plain")), scorer(program, images("plain"))
    whole.batch, split.batch = 6, 1
    one, other = (estimator(each) for each in (whole, split))
    # Other round-off of a batch's sums may take a value to the next step of an activation.
    np.testing.assert_allclose(one.values, other.values, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(one.stderr, other.stderr, rtol=1e-3, atol=1e-7)


def test_the_same_numbers_again_and_finished_scores_are_not_measured_again(
    estimator: Estimator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(store: ScoreStore | None = None) -> Scorer:
        return scorer(simulated("plain"), images("plain"), store=store)

    first = estimator(made(ScoreStore(tmp_path, {"model": "a"})))
    assert same(first, estimator(made()))
    again = made(ScoreStore(tmp_path, {"model": "a"}))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(GraphReplay, "forward", refuse)
    monkeypatch.setattr(GraphReplay, "replay", refuse)
    assert same(first, estimator(again))


def test_cross_entropy_with_labels(estimator: Estimator) -> None:
    labelled = CalibrationSet(inputs("plain", 6), torch.tensor([0, 1, 2, 3, 0, 1]))
    found = estimator(scorer(simulated("plain"), labelled, "ce"))
    assert found.unit == ("cross-entropy nats" if estimator.unit is None else estimator.unit)
    assert np.isfinite(found.values).all()


def test_several_activation_widths(estimator: Estimator) -> None:
    program = simulated("plain", (2, 8), (2, 8))
    found = estimator(scorer(program, images("plain")))
    assert found.candidates == program[Sites].candidates

    def predicted(weight_bits: int, activation_bits: int) -> float:
        return found.predict(dict.fromkeys(found.sites, Choice(weight_bits, activation_bits)))

    # Fewer bits cost more, of weights as of activations.
    assert predicted(2, 8) > predicted(8, 8) > 0
    assert predicted(8, 2) > predicted(8, 8)


def test_a_context_works_or_is_refused(estimator: Estimator) -> None:
    program = simulated("plain")
    plan = {site.name: Choice(4, 8) for site in program[Sites].sites}
    each = Scorer(program, images("plain"), "kl", ScoreStore(None, {}), context=BitAllocation(plan))
    if estimator.float_only:
        with pytest.raises(OptionError, match=f"'{estimator.name}' is defined around the float network only"):
            estimator(each)
        return
    found = estimator(each)
    assert found.constant > 0
    assert found.predict(plan) == pytest.approx(found.constant)
    assert found.predict(plan | {"conv1": Choice(8, 8)}) != found.predict(plan | {"conv1": Choice(2, 8)})
