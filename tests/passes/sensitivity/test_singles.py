"""Single substitutions, and the estimators made of them: `diagonal`, `gram`, `gram_shrunk`, `sqnr`."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fxquant.core.ir import Sites
from fxquant.core.run import LOSSES, CalibrationSet, loss_of
from fxquant.core.storage import ScoreStore
from fxquant.passes import widest_plan
from fxquant.passes.sensitivity import ESTIMATORS, Scorer, measure_singles
from fxquant.passes.sensitivity import stretches as depth
from tests.scoring import full_forward, full_forward_losses, inputs, scorer, simulated

diagonal, gram, sqnr = (ESTIMATORS[name] for name in ("diagonal", "gram", "sqnr"))
IMAGES = CalibrationSet(inputs("plain", 6))


def test_losses_per_image_in_the_order_of_the_images() -> None:
    each = scorer(simulated("plain"), IMAGES)
    found = measure_singles(each)
    assert found.losses.shape == (12, 6)
    for column, candidate in enumerate(each.candidates):
        expected = full_forward_losses("plain", IMAGES, "kl", candidate).numpy()
        np.testing.assert_allclose(found.losses[column], expected, rtol=1e-4, atol=1e-9)


def test_inner_products_over_all_images_and_batches() -> None:
    each = scorer(simulated("plain"), IMAGES)
    assert len(each.batches) == 2
    found = measure_singles(each)
    reference = full_forward("plain", 6)
    shifts = [full_forward("plain", 6, candidate) - reference for candidate in each.candidates]
    embedded = torch.stack([LOSSES["kl"].embed(reference, shift) for shift in shifts]).double()
    products = torch.einsum("inf,jnf->nij", embedded, embedded)
    np.testing.assert_allclose(found.gram, products.mean(0).numpy(), rtol=1e-3, atol=1e-8)
    spread = products.std(0).numpy() / 6**0.5
    np.testing.assert_allclose(found.gram_stderr, spread, rtol=1e-2, atol=1e-8)


def test_one_base_pass_and_at_most_one_pass_per_candidate() -> None:
    found = measure_singles(scorer(simulated("plain"), IMAGES))
    assert 6 < found.evaluations < 6 * 13


@pytest.mark.parametrize("room", [0.0, 0.3, 1.0, 30.0])
def test_the_deeper_a_column_lies_the_more_images_run_at_once(room: float, monkeypatch: pytest.MonkeyPatch) -> None:
    program, images = simulated("plain"), IMAGES
    each = scorer(program, images)
    each.batch = 6
    expected = measure_singles(each)
    monkeypatch.setattr(depth, "ENVIRONMENT_LIMIT", int(room * each.footprint.total))
    other = scorer(program, images)
    other.batch, other.footprint = 1, replace(other.footprint, working=1)
    divided = depth.stretches(other)
    sizes = [stretch.images for stretch in divided]
    assert sorted(column for stretch in divided for column in stretch.columns) == list(range(len(other.columns)))
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == {0.0: (1, 1), 0.3: (1, 6), 1.0: (1, 6), 30.0: (6, 6)}[room]
    found = measure_singles(other)
    for known in ("losses", "gram", "gram_stderr", "shift_power", "answer_power"):
        np.testing.assert_allclose(getattr(found, known), getattr(expected, known), rtol=1e-3, atol=1e-7)
    # What a stretch keeps is enough for its replays: nothing but the run it starts from is run again.
    if room:
        assert found.evaluations == pytest.approx(expected.evaluations + 6 * (len(divided) - 1), abs=1e-6)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_no_more_images_than_a_run_from_the_front_has_room_for(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    each = scorer(simulated("plain"), IMAGES)
    each.batch = 1
    monkeypatch.setattr(depth, "ENVIRONMENT_LIMIT", count * each.footprint.working)
    assert depth.images_of_a_cell(each) == min(count, 6)
    assert max(stretch.images for stretch in depth.stretches(each)) <= min(count, 6)


def test_cross_terms_are_the_gauss_newton_products_of_logit_shifts() -> None:
    found = gram(scorer(simulated("plain"), IMAGES))
    reference = full_forward("plain", 6).double()
    p = torch.softmax(reference, 1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    shifts = [full_forward("plain", 6, candidate).double() - reference for candidate in found.candidates]
    for i, one in enumerate(found.candidates):
        for j, other in enumerate(found.candidates):
            if one.site != other.site:
                expected = torch.einsum("nc,ncd,nd->n", shifts[i], fisher, shifts[j]).mean()
                assert found.values[i, j] + found.values[j, i] == pytest.approx(float(expected), rel=1e-3, abs=1e-7)


def test_a_third_of_the_pair_terms_and_all_of_the_measured_losses() -> None:
    each = scorer(simulated("plain"), IMAGES)
    whole, found = gram(each), ESTIMATORS["gram_shrunk"](each)
    owners = [candidate.site for candidate in found.candidates]
    between = np.array([[one != other for other in owners] for one in owners])
    share = np.where(between, 1 / 3, 1.0)
    assert np.abs(whole.values[between]).max() > 0
    np.testing.assert_allclose(found.values, whole.values * share, rtol=1e-12)
    np.testing.assert_allclose(found.stderr, whole.stderr * share, rtol=1e-12)


def test_positive_semidefinite_where_the_loss_is_quadratic() -> None:
    found = gram(scorer(simulated("split", (4, 6, 8)), CalibrationSet(inputs("split", 24)), "mse"))
    eigenvalues = np.linalg.eigvalsh(found.values)
    assert eigenvalues[0] >= -1e-6 * eigenvalues[-1]


def test_noise_over_signal_of_whole_forward_passes() -> None:
    found, other = (sqnr(scorer(simulated("plain"), IMAGES, loss)) for loss in ("kl", "mse"))
    answer = full_forward("plain", 6).double()
    signal = answer.square().sum(1)
    for row, candidate in enumerate(found.candidates):
        noise = (full_forward("plain", 6, candidate).double() - answer).square().sum(1)
        ratio = float(noise.sum() / signal.sum())
        assert found.values[row, row] == pytest.approx(ratio, rel=1e-5)
        # The standard error of a ratio of means.
        spread = float((noise - ratio * signal).std()) / 6**0.5 / float(signal.mean())
        assert found.stderr[row, row] == pytest.approx(spread, rel=1e-3)
    assert np.array_equal(found.values, other.values), "the loss does not matter"


def along(reference: torch.Tensor, output: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """A loss that is linear in the answer."""
    del labels
    return ((output - reference) * torch.arange(1, 6)).sum(dim=1)


def test_in_the_widest_context_deltas_of_an_additive_network_are_exact() -> None:
    # CalibTIP: each layer narrowed alone in a network of 8 bits. Where answers and loss add up, so do the deltas.
    program, images = simulated("split"), CalibrationSet(inputs("split", 6))
    found = diagonal(Scorer(program, images, loss_of(along), ScoreStore(None, {}), context=widest_plan(program)))
    reference = full_forward("split", 6)
    for plan in itertools.product(*(site.candidates for site in program[Sites].sites)):
        measured = along(reference, full_forward("split", 6, *plan), None).double().mean()
        predicted = found.predict({candidate.site: candidate.choice for candidate in plan})
        assert predicted == pytest.approx(float(measured), rel=1e-4, abs=1e-6)
    assert found.constant != 0
