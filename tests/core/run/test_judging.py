from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.core.run import CalibrationSet, can_mix, judging_images, mixed, moved

IMAGES = torch.randn(9, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def test_every_image_is_mixed_with_another_one_once() -> None:
    # Images of one hot pixel each show who is in a mixture, and with which share.
    shares = mixed(torch.eye(7), seed=3)
    own, others = shares.diagonal(), shares - shares.diagonal().diag()
    assert bool(((own >= 0.25) & (own <= 0.75)).all())
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(7))
    assert (others > 0).sum(dim=1).tolist() == [1] * 7
    assert (others > 0).sum(dim=0).tolist() == [1] * 7
    assert len(set(own.tolist())) == 7
    assert torch.equal(shares, mixed(torch.eye(7), seed=3))
    assert not torch.equal(shares, mixed(torch.eye(7), seed=4))


def test_inputs_of_one_model_are_mixed_alike() -> None:
    pair = judging_images(CalibrationSet((torch.eye(7), torch.eye(7).reshape(7, 7, 1).double())), "kl", 1)
    torch.testing.assert_close(pair.inputs[0].double(), pair.inputs[1].squeeze(2))
    assert pair.inputs[1].dtype == torch.float64


def test_moved_images_are_crops_of_the_reflected_ones() -> None:
    found = moved(IMAGES, seed=1)
    padded = torch.nn.functional.pad(IMAGES, (3, 3, 2, 2), mode="reflect")

    def sources(number: int) -> list[tuple[int, int, bool]]:
        crops = [(top, left, flip) for top in range(5) for left in range(7) for flip in (False, True)]
        return [crop for crop in crops if torch.equal(_crop(padded[number], *crop), found[number])]

    places = [sources(number) for number in range(len(IMAGES))]
    assert all(len(place) == 1 for place in places)
    assert len({place[0] for place in places}) > 5
    assert {place[0][2] for place in places} == {False, True}


def _crop(image: Tensor, top: int, left: int, flip: bool) -> Tensor:
    crop = image[:, top : top + 16, left : left + 24]
    return crop.flip(-1) if flip else crop


def test_small_images_and_other_tensors_do_not_move() -> None:
    rows = torch.randn(4, 5)
    assert moved(rows, seed=0) is rows
    tiny = torch.randn(4, 1, 3, 3)
    still = moved(tiny, seed=0)
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(still, tiny, strict=True))


@pytest.mark.parametrize(
    ("images", "loss"),
    [
        (CalibrationSet((IMAGES,), torch.arange(9)), "ce"),
        (CalibrationSet((IMAGES,)), "mse"),
        (CalibrationSet((torch.arange(12).reshape(3, 4),)), "kl"),
        (CalibrationSet((IMAGES, torch.arange(9))), "kl"),
        (CalibrationSet((IMAGES[:1],)), "kl"),
    ],
)
def test_what_cannot_be_mixed_stays(images: CalibrationSet, loss: str) -> None:
    assert judging_images(images, loss, 0) is images


def test_labels_of_mixed_images_are_dropped() -> None:
    judged = judging_images(CalibrationSet((IMAGES,), torch.arange(9)), "kl", 0)
    assert judged.labels is None
    torch.testing.assert_close(judged.inputs[0], mixed(moved(IMAGES, 0), 0))


@pytest.mark.parametrize("only", [[0], [8, 3, 5], list(range(9))])
def test_some_of_the_mixtures_are_those_of_all(only: list[int]) -> None:
    everything = CalibrationSet((IMAGES,), torch.arange(9))
    every, some = (judging_images(everything, "kl", 0, only=each) for each in (None, only))
    assert torch.equal(some.inputs[0], every.inputs[0][only])
    assert can_mix(everything, "kl")
    assert not can_mix(everything, "mse")
    as_they_are = judging_images(everything, "mse", 0, only=only)
    assert torch.equal(as_they_are.inputs[0], IMAGES[only])
    assert torch.equal(IMAGES, torch.randn(9, 3, 16, 24, generator=torch.Generator().manual_seed(0))), "in place"


def test_mixtures_are_the_same_however_many_are_made() -> None:
    images = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0))
    every = mixed(images, 0)
    for k in range(len(images)):
        assert torch.equal(mixed(images, 0, only=[k])[0], every[k])
