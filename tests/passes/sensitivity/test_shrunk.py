from __future__ import annotations

import numpy as np
import pytest

from fxquant.passes.sensitivity import shrunk_pairs
from tests.passes.sensitivity.runs import made_up

EXACT = made_up(4)


def test_interactions_lose_two_standard_errors_and_keep_their_sign() -> None:
    found = shrunk_pairs(EXACT)
    between = EXACT.measured
    before, after, error = EXACT.values[between], found.values[between], EXACT.stderr[between]
    np.testing.assert_allclose(after, np.sign(before) * np.maximum(np.abs(before) - 2 * error, 0), atol=1e-12)
    assert (after == 0).any()
    assert (after != 0).any()
    assert np.array_equal(np.diag(found.values), np.diag(EXACT.values))
    assert found.notes["kept_share"] == pytest.approx(np.abs(after).sum() / np.abs(before).sum())


def test_one_image_leaves_the_pairs_as_they_are() -> None:
    one = made_up(1)
    assert np.array_equal(shrunk_pairs(one).values, one.values)
