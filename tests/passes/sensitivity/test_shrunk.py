from __future__ import annotations

import numpy as np

from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import ESTIMATORS
from tests.scoring import inputs, scorer, simulated

pairs = ESTIMATORS["pairs"]
shrunk = ESTIMATORS["shrunk"]


IMAGES = CalibrationSet(inputs("plain", 6))


def test_interactions_lose_two_standard_errors_and_keep_their_sign() -> None:
    exact, found = (estimate(scorer(simulated("plain"), IMAGES)) for estimate in (pairs, shrunk))
    sites = np.array([c.site for c in exact.candidates])
    between = sites[:, None] != sites[None, :]
    before, after, error = exact.values[between], found.values[between], exact.stderr[between]
    np.testing.assert_allclose(after, np.sign(before) * np.maximum(np.abs(before) - 2 * error, 0), atol=1e-12)
    assert (after == 0).any()
    assert (after != 0).any()
    assert np.array_equal(np.diag(found.values), np.diag(exact.values))
    assert 0 < found.notes["kept_share"] < 1


def test_one_image_leaves_the_pairs_as_they_are() -> None:
    one = CalibrationSet(inputs("plain", 1))
    exact, found = (estimate(scorer(simulated("plain"), one)) for estimate in (pairs, shrunk))
    assert np.array_equal(found.values, exact.values)
