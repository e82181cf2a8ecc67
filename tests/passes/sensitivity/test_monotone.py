from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant.passes.sensitivity import falling, monotone_pairs, repair, shrunk_pairs
from tests.passes.sensitivity.runs import made_up

GROUPS = [np.array([0, 1]), np.array([2, 3, 4]), np.array([5, 6])]


@given(st.integers(0, 10_000))
def test_widening_a_site_never_raises_the_model(seed: int) -> None:
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(7, 7))
    values = (raw + raw.T) / 2
    repaired, shares = repair(values, GROUPS)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert np.array_equal(repaired, repaired.T)

    def loss(plan: tuple[int, ...]) -> float:
        x = np.zeros(7)
        x[[group[k] for group, k in zip(GROUPS, plan, strict=True)]] = 1
        return float(x @ repaired @ x)

    for plan in product(range(2), range(3), range(2)):
        for site in range(3):
            if plan[site] + 1 < len(GROUPS[site]):
                wider = tuple(k + (j == site) for j, k in enumerate(plan))
                assert loss(wider) <= loss(plan) + 1e-9


def test_a_matrix_that_is_monotone_stays_as_it_is() -> None:
    values = np.diag([3.0, 1.0, 3.0, 2.0, 1.0, 3.0, 1.0])
    values[0, 2] = values[2, 0] = 0.1
    repaired, shares = repair(values, GROUPS)
    assert np.array_equal(repaired, values)
    assert shares.tolist() == [1.0, 1.0, 1.0]


def test_saturated_pairs_are_scaled_until_bits_are_worth_having() -> None:
    """Two narrow choices of loss 1 each that together cost 1: giving up the second is free, and stays so."""
    groups = [np.array([0, 1]), np.array([2, 3])]
    values = np.diag([1.0, 0.0, 1.0, 0.0])
    values[0, 2] = values[2, 0] = -0.9
    repaired, shares = repair(values, groups)
    assert shares == pytest.approx([1 / 1.8, 1 / 1.8])
    assert repaired[0, 2] == pytest.approx(-0.5)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_falling_is_the_nearest_sequence_that_never_rises(losses: list[float]) -> None:
    found = falling(np.array(losses))
    assert (np.diff(found) <= 1e-12).all()
    assert found.sum() == pytest.approx(sum(losses), abs=1e-9)
    if all(a >= b for a, b in pairwise(losses)):
        np.testing.assert_allclose(found, losses)


def test_by_hand() -> None:
    np.testing.assert_allclose(falling(np.array([1.0, 3.0, 0.0])), [2.0, 2.0, 0.0])


def test_pairs_are_scaled_never_turned() -> None:
    exact = made_up(4)
    found = monotone_pairs(exact)
    off = exact.measured
    assert (np.abs(found.values[off]) <= np.abs(exact.values[off]) + 1e-12).all()
    assert (np.sign(found.values[off]) * np.sign(exact.values[off]) >= 0).all()
    assert 0 < found.notes["mean_share"] < 1


def test_what_the_context_has_stays_at_zero() -> None:
    """The owner's wider choice costs more by chance: averaging the two must not give the context a loss."""
    exact = made_up(4)
    exact.alone[0] = 0.0
    found = monotone_pairs(exact)
    assert found.values[0, 0] == found.values[1, 1] == 0.0


def test_interactions_lose_two_standard_errors_and_keep_their_sign() -> None:
    exact = made_up(4)
    found = shrunk_pairs(exact)
    between = exact.measured
    before, after, error = exact.values[between], found.values[between], exact.stderr[between]
    np.testing.assert_allclose(after, np.sign(before) * np.maximum(np.abs(before) - 2 * error, 0), atol=1e-12)
    assert (after == 0).any()
    assert (after != 0).any()
    assert np.array_equal(np.diag(found.values), np.diag(exact.values))
    assert found.notes["kept_share"] == pytest.approx(np.abs(after).sum() / np.abs(before).sum())


def test_one_image_leaves_the_pairs_as_they_are() -> None:
    one = made_up(1)
    assert np.array_equal(shrunk_pairs(one).values, one.values)
