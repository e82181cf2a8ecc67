"""The shipped demo network: its size, its accuracy, its data and its training code."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fxquant.core.errors import FileFormatError, MissingDependencyError
from fxquant.demo import (
    TRAIN_IMAGES,
    augmented,
    digits_data,
    digits_network,
    digits_split,
    held_out_accuracy,
    network,
    trained,
)


def test_weights_and_parameters_are_small() -> None:
    assert network.WEIGHTS.stat().st_size < 1_000_000
    assert sum(p.numel() for p in digits_network().parameters()) < 230_000


def test_shipped_network_is_accurate_on_held_out_digits() -> None:
    model = digits_network()
    assert not model.training
    assert held_out_accuracy(model, digits_data()) > 97.0


def test_split_is_disjoint_complete_and_repeatable() -> None:
    split = digits_split(1797)
    train, calibration, held_out = (set(part.tolist()) for part in (split.train, split.calibration, split.held_out))
    assert not train & held_out
    assert calibration < train
    assert train | held_out == set(range(1797))
    assert torch.equal(split.held_out, digits_split(1797).held_out)


def test_images_are_normalised_and_shaped() -> None:
    data = digits_data()
    assert data.train.shape == (TRAIN_IMAGES, 1, 32, 32)
    assert data.held_out.shape == (1797 - TRAIN_IMAGES, 1, 32, 32)
    assert data.held_out_labels.dtype == torch.int64
    assert abs(data.train.mean().item()) < 0.1
    assert abs(data.train.std().item() - 1.0) < 0.1


def test_augmentation_keeps_shape_and_follows_its_generator() -> None:
    images = digits_data().train[:4]
    first, second = (augmented(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == images.shape
    assert torch.equal(first, second)
    assert not torch.equal(first, images)


def test_training_lowers_the_loss_without_touching_the_global_generator() -> None:
    whole = digits_data()
    data = replace(whole, train=whole.train[:64], train_labels=whole.train_labels[:64])
    before = torch.random.get_rng_state()
    model = trained(data, epochs=6)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not model.training
    # Batch statistics, because the running ones are still young after six steps; chance is 2.3.
    loss = F.cross_entropy(model.train()(data.train), data.train_labels)
    assert loss.item() < 2.1


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "fxquant\[demo\]"'):
        digits_data()


def test_foreign_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "read_tensors", lambda _: {"stem.weight": torch.zeros(1)})
    with pytest.raises(FileFormatError, match="does not fit DigitsNet"):
        digits_network()
