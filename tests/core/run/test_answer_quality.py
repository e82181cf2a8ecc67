from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.core.errors import CalibrationError
from fxquant.core.run import keeps, quality

SCORES = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 4.0], [5.0, 0.0, 0.0]])


def test_first_answers_are_counted() -> None:
    moved = SCORES.clone()
    moved[1] = torch.tensor([9.0, 0.0, 0.0])
    labels = torch.tensor([0, 1, 2, 1])
    found = quality(("loss", "disagreement", "accuracy_drop"), SCORES, moved, labels, "kl")
    assert found["disagreement"] == 0.25
    assert found["accuracy_drop"] == 0.25
    assert found["loss"] > 0
    assert quality(("disagreement", "accuracy_drop"), moved, SCORES, labels, "kl")["accuracy_drop"] == -0.25
    assert set(quality(("loss",), SCORES, SCORES, None, "kl").values()) == {0.0}


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_accuracy_never_falls_by_more_than_first_answers_change(seed: int, classes: int, images: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(images, classes, generator=generator)
    output = reference + torch.randn(images, classes, generator=generator)
    labels = torch.randint(0, classes, (images,), generator=generator)
    found = quality(("disagreement", "accuracy_drop"), reference, output, labels, "kl")
    assert abs(found["accuracy_drop"]) <= found["disagreement"] + 1e-12


def test_every_position_of_a_map_counts() -> None:
    maps = torch.zeros(2, 3, 4, 4)
    maps[:, 1] = 1.0
    other = maps.clone()
    other[0, 2, 0, :2] = 5.0
    assert quality(("disagreement",), maps, other, None, "mse") == {"disagreement": 2 / 32}


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
