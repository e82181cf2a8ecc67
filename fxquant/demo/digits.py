"""The demo's images: scikit-learn's 1797 handwritten digits (8x8), enlarged to 32x32 and split by a seed.

Source: Alpaydin and Kaynak 1998, UCI Optical Recognition of Handwritten Digits, bundled with scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.core.errors import MissingDependencyError

SEED = 0
TRAIN_IMAGES = 797
CALIBRATION_IMAGES = 128

_SIDE = 32
_FULL_INK = 16.0
# Mean and spread of ink over the train images, rounded; fixed so that a change of split moves nothing.
_MEAN = 0.3
_STD = 0.35


@dataclass(frozen=True)
class DigitsSplit:
    """Positions in scikit-learn's order: `calibration` lies inside `train`, `held_out` apart from both."""

    train: Tensor
    calibration: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class DigitsData:
    """Normalised images float32 `(N, 1, 32, 32)` and labels int64 `(N,)`; `calibration` has no labels."""

    train: Tensor
    train_labels: Tensor
    calibration: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def digits_split(count: int) -> DigitsSplit:
    """Return the seeded split of `count` images: 797 train, 128 of them calibration, the other 1000 held out."""
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(count))
    return DigitsSplit(order[:TRAIN_IMAGES], order[:CALIBRATION_IMAGES], order[TRAIN_IMAGES:])


def normalised(ink: Tensor) -> Tensor:
    """Return 8x8 images `(N, 8, 8)` of ink 0..16 as `(N, 1, 32, 32)` with mean near 0 and spread near 1."""
    enlarged = F.interpolate(ink.unsqueeze(1) / _FULL_INK, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
    return (enlarged - _MEAN) / _STD


def digits_data() -> DigitsData:
    """Return the digits, enlarged, normalised and split.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        # Imported here because only the demo needs it.
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            'the demo reads scikit-learn\'s digits, and scikit-learn is not installed; pip install "fxquant[demo]"'
        ) from error
    bundled = load_digits()
    images = normalised(torch.from_numpy(bundled.images).float())
    labels = torch.from_numpy(bundled.target).long()
    split = digits_split(len(labels))
    return DigitsData(
        train=images[split.train],
        train_labels=labels[split.train],
        calibration=images[split.calibration],
        held_out=images[split.held_out],
        held_out_labels=labels[split.held_out],
    )
