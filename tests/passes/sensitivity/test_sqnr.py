from __future__ import annotations

import numpy as np
import pytest

from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import ESTIMATORS
from tests.scoring import full_forward, inputs, scorer, simulated

sqnr = ESTIMATORS["sqnr"]


IMAGES = CalibrationSet(inputs("plain", 6))


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
