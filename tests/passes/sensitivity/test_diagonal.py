from __future__ import annotations

import numpy as np

from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import ESTIMATORS, standard_error
from tests.scoring import inputs, scorer, simulated

diagonal = ESTIMATORS["diagonal"]


def test_fewer_bits_hurt_more() -> None:
    found = diagonal(scorer(simulated("plain"), CalibrationSet(inputs("plain", 6))))
    losses = np.diag(found.values).reshape(4, 3)
    assert (np.diff(losses, axis=1) < 0).all()


def test_standard_error_by_hand() -> None:
    np.testing.assert_allclose(standard_error(np.array([[1.0, 3.0], [2.0, 2.0]])), [1.0, 0.0])
    assert np.isnan(standard_error(np.array([[1.0], [2.0]]))).all()
