"""Single substitutions: the loss and the output shift of every column on its own.

From one sweep over the n columns come the measured diagonal and, through inner products of the embedded shifts
`e_i` (`loss ~ |e|^2 / 2`, see `core.run.Loss.embed`), the Gram approximation of every pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxquant.core.host import give_back
from fxquant.core.run import Environment
from fxquant.passes.sensitivity.cell_sweep import Cell
from fxquant.passes.sensitivity.scorer import Base, Batch, Scorer
from fxquant.passes.sensitivity.stretches import Stretch, images_of_a_cell, stretches


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
    images, divided = images_of_a_cell(scorer), stretches(scorer)
    name = "alone" if images == scorer.batch else f"alone{images}"
    found = scorer.by_batch("score single choices", name, partial(_cell, divided=divided), images)
    losses = found.joined("losses")
    total = losses.shape[1]
    mean, square = found.total("gram_sum") / total, found.total("gram_square") / total
    stderr = np.sqrt(np.maximum(square - mean**2, 0.0) / (total - 1)) if total > 1 else np.full(mean.shape, np.nan)
    return Singles(losses, mean, stderr, found.joined("shift_power"), found.joined("answer_power"), found.evaluations)


def _cell(scorer: Scorer, batch: Batch, divided: Sequence[Stretch]) -> Cell:
    losses, shifts, powers = ({k: list[Tensor]() for k in range(len(scorer.columns))} for _ in range(3))
    spent = 0.0
    bases = list[Base]()
    for stretch in divided:
        # Only the answers are held, not the values in between.
        bases.clear()
        give_back()
        for part in batch.images.batches(stretch.images):
            base = scorer.base_of(part, stretch.kept)
            for column in stretch.columns:
                answer, _ = scorer.run(base.environment, column)
                losses[column].append(scorer.losses(base, answer, part))
                shifts[column].append(answer - base.answer)
                powers[column].append(_power(answer - base.answer))
            bases.append(replace(base, environment=Environment({})))
            # The next run needs the room.
            del base
            spent += scorer.take_spent(len(part))
    reference, answers = (torch.cat([getattr(base, name) for base in bases]) for name in ("reference", "answer"))
    per_image = scorer.loss.products(
        reference, answers, [torch.cat(parts) for parts in shifts.values()], batch.images.labels
    )
    return {
        "losses": np.stack([torch.cat(parts).cpu().numpy() for parts in losses.values()]),
        "gram_sum": per_image.sum(dim=0).cpu().numpy(),
        "gram_square": per_image.square().sum(dim=0).cpu().numpy(),
        "shift_power": np.stack([torch.cat(parts).cpu().numpy() for parts in powers.values()]),
        "answer_power": _power(answers).cpu().numpy(),
        "evaluations": spent,
    }


def _power(values: Tensor) -> Tensor:
    return values.double().reshape(len(values), -1).square().sum(dim=1)
