from __future__ import annotations

import numpy as np
import pytest

from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import ESTIMATORS
from tests.scoring import full_forward, inputs, scorer, simulated

sqnr = ESTIMATORS["sqnr"]


IMAGES = CalibrationSet(inputs("plain", 6))


def test_noise_over_signal_of_whole_forward_passes() -> None:
    found = sqnr(scorer(simulated("plain"), IMAGES))
    answer = full_forward("plain", 6).double()
    for row, candidate in enumerate(found.candidates):
        noise = full_forward("plain", 6, candidate).double() - answer
        assert found.values[row, row] == pytest.approx(float(noise.square().sum() / answer.square().sum()), rel=1e-5)
    assert found.unit == "noise-to-signal power"
    assert np.array_equal(found.values, np.diag(np.diag(found.values)))


def test_the_loss_does_not_matter() -> None:
    one, other = (sqnr(scorer(simulated("plain"), IMAGES, loss)) for loss in ("kl", "mse"))
    assert np.array_equal(one.values, other.values)


def test_the_standard_error_is_that_of_a_ratio() -> None:
    found = sqnr(scorer(simulated("plain"), IMAGES))
    answer = full_forward("plain", 6).double().square().sum(dim=1).numpy()
    noise = (full_forward("plain", 6, found.candidates[0]) - full_forward("plain", 6)).double()
    power = noise.square().sum(dim=1).numpy()
    ratio = power.sum() / answer.sum()
    expected = (power - ratio * answer).std(ddof=1) / 6**0.5 / answer.mean()
    assert found.stderr[0, 0] == pytest.approx(expected, rel=1e-4)
    # Jackknife: the spread of the ratio when one image is left out, another way to the same number.
    left_out = np.array([np.delete(power, k).sum() / np.delete(answer, k).sum() for k in range(6)])
    assert found.stderr[0, 0] == pytest.approx(np.sqrt(5 / 6 * np.square(left_out - left_out.mean()).sum()), rel=0.3)
