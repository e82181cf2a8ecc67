"""Measured pairs that are made up, for what is computed of them."""

from __future__ import annotations

import numpy as np

from fxquant.passes.sensitivity import PairRuns


def made_up(images: int, context_loss: float = 0.0) -> PairRuns:
    """Return seeded runs of three owners with two columns each, pairs of losses that saturate."""
    random = np.random.default_rng(images)
    owners = ("a", "a", "b", "b", "c", "c")
    alone = random.uniform(0.1, 0.5, (6, images)) * np.tile([2.0, 0.3], 3)[:, None]
    narrow = np.tile([True, False], 3)
    saturated = np.where(narrow[:, None] & narrow[None], 0.5, 1.0)[:, :, None]
    both = (alone[:, None] + alone[None]) * saturated * random.uniform(0.9, 1.1, (6, 6, images))
    both = (both + both.transpose(1, 0, 2)) / 2
    measured = np.array([[one != other for other in owners] for one in owners])
    return PairRuns(owners, alone, np.where(measured[:, :, None], both, 0.0), measured, 42.0, False, context_loss)
