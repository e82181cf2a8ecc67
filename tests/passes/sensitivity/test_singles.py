"""Single substitutions, and the estimators made of them: `diagonal`, `gram`, `gram_shrunk`, `sqnr`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from fxquant.core.ir import Sites
from fxquant.core.run import LOSSES, CalibrationSet, loss_of
from fxquant.core.storage import ScoreStore
from fxquant.passes import widest_plan
from fxquant.passes.sensitivity import ESTIMATORS, Scorer, Work, measure_singles, thinned, wide_columns
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


class TestThinned:
    """Wide columns on some batches: what is run is the same, what is not is scaled by the owner's narrow column."""

    @staticmethod
    def scorers() -> tuple[Scorer, Scorer]:
        whole, some = scorer(simulated("plain"), IMAGES), scorer(simulated("plain"), IMAGES)
        whole.batch = some.batch = 2
        some.wide_every = 3
        return whole, some

    def test_wide_columns_have_a_narrow_one_of_their_owner(self) -> None:
        each = self.scorers()[0]
        found = wide_columns(each.columns)
        assert found
        for wide, narrow in found.items():
            one, other = each.columns[wide], each.columns[narrow]
            assert one.owner == other.owner
            assert (one.weight_bits or 0) >= 6 > (other.weight_bits or 0)

    def test_narrow_columns_are_measured_as_ever(self) -> None:
        whole, some = self.scorers()
        narrow = [k for k in range(len(whole.columns)) if k not in wide_columns(whole.columns)]
        one, other = gram(whole), gram(some)
        rows = np.ix_(narrow, narrow)
        np.testing.assert_allclose(one.values[rows], other.values[rows], rtol=1e-6, atol=1e-12)
        assert other.evaluations < one.evaluations

    def test_wide_columns_count_by_the_images_they_saw(self) -> None:
        whole, some = self.scorers()
        losses, products, _ = thinned(some)
        every = measure_singles(whole)
        for wide, narrow in wide_columns(some.columns).items():
            # Of three batches of two images, the first.
            assert np.isnan(losses[wide, 2:]).all()
            ratio = every.losses[narrow].mean() / every.losses[narrow, :2].mean()
            assert 1 / 4 < ratio < 4, "else the test shows nothing"
            np.testing.assert_allclose(losses[wide, :2], ratio * every.losses[wide, :2], rtol=1e-6)
        assert np.isfinite(products).all()
        np.testing.assert_allclose(products, products.T, rtol=1e-9)

    def test_time_is_foreseen_by_what_is_run(self) -> None:
        _, some = self.scorers()
        passes: dict[str, float] = {}

        class Seen:
            def of(self, name: str, work: Work, sizes: Mapping[str, float], each: Scorer) -> None:
                del work, each
                passes.update(sizes)
                raise KeyError(name)

        some.preview = Seen()
        with pytest.raises(KeyError, match="alone-wide3"):
            gram(some)
        first, second = passes["alone-wide3-0"], passes["alone-wide3-1"]
        assert first == 2
        assert 0 < second < 2
