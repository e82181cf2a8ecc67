from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.core.errors import CalibrationError
from fxquant.core.run import keeps, learned_share, needed, quality

SCORES = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 4.0], [5.0, 0.0, 0.0]])


def values(names: tuple[str, ...], *answers: Any, loss: str = "kl") -> dict[str, float]:
    reference, output, labels = (*answers, None)[:3]
    return {name: found.value for name, found in quality(names, reference, output, labels, loss).items()}


def test_first_answers_are_counted() -> None:
    moved = SCORES.clone()
    moved[1] = torch.tensor([9.0, 0.0, 0.0])
    labels = torch.tensor([0, 1, 2, 1])
    found = values(("loss", "disagreement", "accuracy_drop"), SCORES, moved, labels)
    assert found["disagreement"] == 0.25
    assert found["accuracy_drop"] == 0.25
    assert found["loss"] > 0
    assert values(("disagreement", "accuracy_drop"), moved, SCORES, labels)["accuracy_drop"] == -0.25
    assert set(values(("loss",), SCORES, SCORES).values()) == {0.0}


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_accuracy_never_falls_by_more_than_first_answers_change(seed: int, classes: int, images: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(images, classes, generator=generator)
    output = reference + torch.randn(images, classes, generator=generator)
    labels = torch.randint(0, classes, (images,), generator=generator)
    found = values(("disagreement", "accuracy_drop"), reference, output, labels)
    assert abs(found["accuracy_drop"]) <= found["disagreement"] + 1e-12


def test_every_position_of_a_map_counts() -> None:
    maps = torch.zeros(2, 3, 4, 4)
    maps[:, 1] = 1.0
    other = maps.clone()
    other[0, 2, 0, :2] = 5.0
    assert values(("disagreement",), maps, other, loss="mse") == {"disagreement": 2 / 32}


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(
        CalibrationError, match=r"class scores along axis 1; the answer has shape \(4, 1\); limit the loss"
    ):
        quality(("disagreement",), SCORES[:, :1], SCORES[:, :1], None, "mse")
    with pytest.raises(CalibrationError, match="accuracy_drop needs one label for each image"):
        quality(("accuracy_drop",), SCORES, SCORES, None, "kl")
    with pytest.raises(CalibrationError, match="accuracy_drop needs one label"):
        quality(("accuracy_drop",), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2), "kl")


def test_a_limit_is_kept_when_met_exactly() -> None:
    assert keeps({"disagreement": 3 / 10}, {"disagreement": 0.3})
    assert not keeps({"disagreement": 0.31, "loss": 0.0}, {"loss": 1.0, "disagreement": 0.3})


def test_bounds_are_those_of_the_measure() -> None:
    """Of no image in n: `1 - 0.05^(1/n)` for a share, `z^2 / (n + z^2)` for a drop; of ten equal losses: themselves."""
    found = quality(("loss", "disagreement", "accuracy_drop"), SCORES, SCORES, torch.zeros(4), "kl")
    assert found["disagreement"].bound == pytest.approx(1 - 0.05**0.25)
    assert found["accuracy_drop"].bound == pytest.approx(2.7055 / (4 + 2.7055), rel=1e-4)
    assert found["loss"].bound == math.inf
    many = SCORES.repeat(3, 1)
    assert quality(("loss",), many, many, None, "kl")["loss"].bound == 0.0
    surer = quality(("disagreement",), SCORES, SCORES, None, "kl", confidence=0.99)["disagreement"]
    assert surer.bound == pytest.approx(1 - 0.01**0.25)


def test_images_without_which_a_limit_cannot_be_shown() -> None:
    assert needed({"disagreement": 0.01, "accuracy_drop": 0.01, "loss": 0.5}, 0.95) == {
        "disagreement": 299,
        "accuracy_drop": 268,
        "loss": 10,
    }
    assert needed({"disagreement": 0.0, "accuracy_drop": 1.0}, 0.95) == {"disagreement": None, "accuracy_drop": 1}


def test_images_learned_by_heart_are_noticed() -> None:
    sure = 20 * torch.eye(3).repeat(10, 1)
    truth = torch.arange(3).repeat(10)
    assert learned_share(sure, None) == learned_share(sure, truth) == 1.0
    # Labels that it gets wrong, answers it doubts, few images, no classes.
    assert learned_share(sure, truth.roll(1)) is None
    assert learned_share(torch.cat([sure[:26], SCORES[:, :3]]), None) is None
    assert learned_share(sure[:9], None) is learned_share(sure[:, :1], None) is None
