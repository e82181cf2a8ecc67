"""Single substitutions: the loss and the output shift of every column on its own.

From one sweep over the n columns come the measured diagonal and, through inner products of the embedded shifts
`e_i` (`loss ~ |e|^2 / 2`, see `core.run.Loss.embed`), the Gram approximation of every pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fxquant.passes.sensitivity.cell_sweep import Cell
from fxquant.passes.sensitivity.scorer import Batch, Scorer


@dataclass(frozen=True)
class Singles:
    """Sums over all images of a sweep of single substitutions.

    Args:
        losses: shape (n, images), loss of column i on each image.
        gram: shape (n, n), mean over images of `e_i . e_j`.
        gram_stderr: shape (n, n), its standard error; NaN for a single image.
        shift_power: shape (n, images), `|shift|^2` of the network's answer for column i.
        answer_power: shape (images,), `|answer|^2` of the context.
        evaluations: whole-network passes over one image spent.
    """

    losses: NDArray[np.float64]
    gram: NDArray[np.float64]
    gram_stderr: NDArray[np.float64]
    shift_power: NDArray[np.float64]
    answer_power: NDArray[np.float64]
    evaluations: float


def measure_singles(scorer: Scorer) -> Singles:
    """Run every column alone on every image, resuming from the scorer's store."""
    found = scorer.by_batch("score single choices", "alone", _cell)
    losses = found.joined("losses")
    total = losses.shape[1]
    mean, square = found.total("gram_sum") / total, found.total("gram_square") / total
    stderr = np.sqrt(np.maximum(square - mean**2, 0.0) / (total - 1)) if total > 1 else np.full(mean.shape, np.nan)
    return Singles(losses, mean, stderr, found.joined("shift_power"), found.joined("answer_power"), found.evaluations)


def _cell(scorer: Scorer, batch: Batch) -> Cell:
    base = scorer.base(batch)
    losses, shifts, powers = [], [], []
    for column in range(len(scorer.columns)):
        answer, _ = scorer.run(base.environment, column)
        losses.append(scorer.losses(base, answer, batch.images).cpu().numpy())
        shifts.append(answer - base.answer)
        powers.append(_power(answer - base.answer))
    per_image = scorer.loss.products(base.reference, base.answer, shifts, batch.images.labels)
    return {
        "losses": np.stack(losses),
        "gram_sum": per_image.sum(dim=0).cpu().numpy(),
        "gram_square": per_image.square().sum(dim=0).cpu().numpy(),
        "shift_power": np.stack(powers),
        "answer_power": _power(base.answer),
    }


def _power(values: Tensor) -> NDArray[np.float64]:
    return np.asarray(values.double().reshape(len(values), -1).square().sum(dim=1).cpu().numpy(), dtype=np.float64)
