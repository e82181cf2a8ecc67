"""How many patches may be hard, and which."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.core.errors import OptionError
from fxquant.core.facts import RouteFit, Routes
from fxquant.core.run import PatchRouter, gradient_magnitude
from fxquant.flow import most_hard, split


def test_gradient_magnitude_by_hand() -> None:
    image = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    # Across: |1| + |2| + 0 + 0 over 4; down: |2| + |1| + |-1| over 3.
    assert float(gradient_magnitude(image[None, None])) == pytest.approx(3 / 4 + 4 / 3)
    with pytest.raises(OptionError, match="needs float images"):
        gradient_magnitude(torch.zeros(2, 3, 1, 5))
    with pytest.raises(OptionError, match="int64"):
        gradient_magnitude(torch.zeros(2, 3, 5, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        # 2 + (6 - 2) * 5 / 10 = 4.
        ({"bops": 4.0}, 5),
        ({"bops": 3.99}, 4),
        ({"bops": 6.0}, 10),
        ({"bops": 1.0}, 0),
        ({"bops": 4.0, "average_bits": 3.0}, 2),
    ],
)
def test_the_mean_cost_decides_how_many_are_hard(limits: dict[str, float], expected: int) -> None:
    easy, hard = {"bops": 2.0, "average_bits": 2.5}, {"bops": 6.0, "average_bits": 5.0}
    assert most_hard(easy, hard, limits, 10) == expected


def test_the_threshold_lies_between_and_equal_patches_stay_together() -> None:
    parts = split(torch.tensor([1.0, 5.0, 3.0, 2.0]), 2)
    assert (parts.count, parts.threshold) == (2, 2.5)
    assert parts.hard.tolist() == [False, True, True, False]
    assert split(torch.tensor([1.0, 3.0, 3.0]), 1).count == 0
    assert split(torch.ones(3), 0).threshold == math.inf
    assert split(torch.ones(3), 3).hard.all()


def test_a_threshold_is_what_float32_compares_with() -> None:
    router = PatchRouter(0.1)
    assert router.threshold == float(torch.tensor(0.1))
    with pytest.raises(OptionError, match="NaN"):
        PatchRouter(math.nan)


def test_fits_and_routes_are_checked() -> None:
    fit = RouteFit(0.5, 0.25, 8, {"bops": 1.0}, {"bops": 2.0}, 0.1, 0.2)
    assert RouteFit.from_json(fit.to_json()) == fit
    with pytest.raises(OptionError, match="share"):
        RouteFit(0.5, 1.5, 8, {}, {}, 0.1, 0.2)
    with pytest.raises(OptionError, match="easy"):
        Routes({}, fit)
