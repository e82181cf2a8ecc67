"""`pairs`: CLADO's exact pair terms by the four-term identity (Deng et al., arXiv 2307.05657, section 3).

`W_ij = loss(i and j) - loss(i) - loss(j)`, losses counted from the context's own. The run of (i, b) is kept, and each
(j, c) is replayed on top of it from j on: the same numbers as whole forwards, at about a third of their work. With
cross-entropy the matrix is projected to the nearest positive semidefinite one, as the paper does; with KL it is left as
measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fxquant.core.facts import SensitivityMatrix
from fxquant.core.storage import text_digest
from fxquant.passes.sensitivity.cell_sweep import Cell
from fxquant.passes.sensitivity.registry import ESTIMATORS
from fxquant.passes.sensitivity.scorer import Part, Scorer, standard_error
from fxquant.passes.sensitivity.singles import Singles, measure_singles


@dataclass(frozen=True)
class Interactions:
    """Measured pairs.

    Args:
        singles: the single substitutions.
        joint: shape (m, m, images), symmetric: loss of both columns together; 0 where not measured.
        measured: shape (m, m), symmetric: which pairs were.
        evaluations: whole-network passes over one image spent, the singles' included.
    """

    singles: Singles
    joint: NDArray[np.float64]
    measured: NDArray[np.bool_]
    evaluations: float

    @property
    def interaction(self) -> NDArray[np.float64]:
        """Shape (m, m, images): `loss(i and j) - loss(i) - loss(j)`, 0 where not measured."""
        alone = self.singles.losses
        return np.where(self.measured[:, :, None], self.joint - alone[:, None] - alone[None], 0.0)


@ESTIMATORS.register("pairs")
def pairs(scorer: Scorer) -> SensitivityMatrix:
    """Return the measured pair matrix, `m + pairs between owners` runs per image."""
    found = measure_pairs(scorer, scorer.between)
    interaction, alone = found.interaction, found.singles.losses
    values = interaction.mean(axis=2) / 2 + np.diag(alone.mean(axis=1))
    stderr = standard_error(interaction) / 2 + np.diag(standard_error(alone))
    if scorer.loss == "ce":
        values = positive_part(values)
    return scorer.matrix("pairs", values, stderr, found.evaluations)


def positive_part(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the nearest positive semidefinite matrix: negative eigenvalues set to zero (the paper's step)."""
    eigenvalues, vectors = np.linalg.eigh((values + values.T) / 2)
    return np.asarray((vectors * np.maximum(eigenvalues, 0.0)) @ vectors.T, dtype=np.float64)


def measure_pairs(scorer: Scorer, wanted: NDArray[np.bool_]) -> Interactions:
    """Measure the wanted pairs of columns on every image, resuming from the scorer's store.

    Args:
        scorer: what to measure with.
        wanted: shape (m, m), symmetric; pairs of one owner are left out.
    """
    singles = measure_singles(scorer)
    size, images = len(scorer.columns), singles.losses.shape[1]
    wanted = wanted & scorer.between
    deeper = _deeper(scorer, wanted)
    # A sweep of all pairs and one of some are kept apart, and so is each choice of some.
    every = np.array_equal(wanted, scorer.between)
    suffix = "" if every else f"-{text_digest(str(sorted((k, tuple(v)) for k, v in deeper.items())))[:12]}"
    work = {
        f"pairs-{part.index}-{row}{suffix}": partial(_row, scorer, part, row, columns)
        for part in scorer.parts
        for row, columns in deeper.items()
    }
    cells = scorer.measure("score pairs of choices", work)
    joint, evaluations = np.zeros((size, size, images)), singles.evaluations
    for part in scorer.parts:
        span = slice(part.index * scorer.batch, part.index * scorer.batch + len(part.images))
        for row, columns in deeper.items():
            cell = cells[f"pairs-{part.index}-{row}{suffix}"]
            joint[row, columns, span] = cell["losses"]
            evaluations += float(cell["evaluations"])
    # Each pair was run once, in the order of depth; the other half mirrors it.
    return Interactions(singles, joint + joint.transpose(1, 0, 2), wanted, evaluations)


def _deeper(scorer: Scorer, wanted: NDArray[np.bool_]) -> dict[int, list[int]]:
    """Return row -> the wanted columns that come after it in the graph, rows without any left out."""
    order = scorer.by_depth
    found = {row: [k for k in order[depth + 1 :] if wanted[row, k]] for depth, row in enumerate(order)}
    return {row: columns for row, columns in found.items() if columns}


def _row(scorer: Scorer, part: Part, row: int, columns: list[int]) -> Cell:
    """Measure one column together with deeper ones, on one batch."""
    base = scorer.base(part)
    _, below = scorer.run(base.environment, row, keep=True)
    losses = [
        scorer.losses(base, scorer.run(below, column, on_top_of=row)[0], part.images).cpu().numpy()
        for column in columns
    ]
    return {"losses": np.stack(losses), "evaluations": scorer.take_spent(len(part.images))}
