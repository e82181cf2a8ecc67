"""`pairs`: CLADO's exact pair terms by the four-term identity (Deng et al., arXiv 2307.05657, section 3).

`W_ij = loss(i and j) - loss(i) - loss(j)`, losses counted from the context's own. The run of (i, b) is kept, and each
(j, c) is replayed on top of it from j on: the same numbers as whole forwards, at about a third of their work. With
cross-entropy the matrix is projected to the nearest positive semidefinite one, as the paper does; with KL it is left as
measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from fxquant.core.storage import text_digest
from fxquant.passes.sensitivity.cell_sweep import Cell
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Batch, Scorer, standard_error
from fxquant.passes.sensitivity.singles import measure_singles


@dataclass(frozen=True)
class PairRuns:
    """Measured losses of the m columns alone and two by two, counted from the context's own.

    Args:
        owners: what each column perturbs.
        alone: shape (m, images), loss of each column alone.
        joint: shape (m, m, images), symmetric: loss of both columns together; 0 where not measured.
        measured: shape (m, m), symmetric: which pairs were.
        evaluations: whole-network passes over one image spent, those of the single columns included.
        needs_labels: whether the loss does.
        context_loss: mean loss of the context.
    """

    owners: tuple[str, ...]
    alone: NDArray[np.float64]
    joint: NDArray[np.float64]
    measured: NDArray[np.bool_]
    evaluations: float
    needs_labels: bool
    context_loss: float

    @cached_property
    def interaction(self) -> NDArray[np.float64]:
        """Shape (m, m, images): `loss(i and j) - loss(i) - loss(j)`, 0 where not measured."""
        return np.where(self.measured[:, :, None], self.joint - self.alone[:, None] - self.alone[None], 0.0)

    @property
    def values(self) -> NDArray[np.float64]:
        """Shape (m, m): mean losses on the diagonal, half of the mean interactions off it."""
        return np.asarray(self.interaction.mean(axis=2) / 2 + np.diag(self.alone.mean(axis=1)), dtype=np.float64)

    @property
    def stderr(self) -> NDArray[np.float64]:
        """Shape (m, m): standard errors of `values`."""
        return standard_error(self.interaction) / 2 + np.diag(standard_error(self.alone))


PairModel = Callable[[PairRuns], Estimate]


def pair_model(name: str, unit: str | None = None) -> Callable[[PairModel], PairModel]:
    """Decorate a function of the measured pairs: register it as an estimator. All of them share the same runs.

    Raises:
        PipelineError: the name is taken.
    """

    def register(model: PairModel) -> PairModel:
        _ = estimator(name, unit=unit, has_pairs=True, measured=unit is None, work="pairs")(
            lambda scorer: model(measure_pairs(scorer, scorer.between))
        )
        return model

    return register


@pair_model("pairs")
def pairs(runs: PairRuns) -> Estimate:
    """Return the measured pair matrix, `m + pairs between owners` runs per image."""
    values = positive_part(runs.values) if runs.needs_labels else runs.values
    return Estimate(values, runs.stderr, runs.evaluations)


def positive_part(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the nearest positive semidefinite matrix: negative eigenvalues set to zero (the paper's step)."""
    eigenvalues, vectors = np.linalg.eigh((values + values.T) / 2)
    return np.asarray((vectors * np.maximum(eigenvalues, 0.0)) @ vectors.T, dtype=np.float64)


def measure_pairs(scorer: Scorer, wanted: NDArray[np.bool_]) -> PairRuns:
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
        f"pairs-{batch.index}-{row}{suffix}": partial(_row, scorer, batch, row, columns)
        for batch in scorer.batches
        for row, columns in deeper.items()
    }
    cells = scorer.measure("score pairs of choices", work)
    joint, evaluations = np.zeros((size, size, images)), singles.evaluations
    for batch in scorer.batches:
        span = slice(batch.index * scorer.batch, batch.index * scorer.batch + len(batch.images))
        for row, columns in deeper.items():
            cell = cells[f"pairs-{batch.index}-{row}{suffix}"]
            joint[row, columns, span] = cell["losses"]
            evaluations += float(cell["evaluations"])
    # Each pair was run once, in the order of depth; the other half mirrors it.
    joint += joint.transpose(1, 0, 2)
    around = (scorer.loss.needs_labels, scorer.context_loss)
    return PairRuns(tuple(scorer.owners), singles.losses, joint, wanted, evaluations, *around)


def _deeper(scorer: Scorer, wanted: NDArray[np.bool_]) -> dict[int, list[int]]:
    """Return row -> the wanted columns that come after it in the graph, rows without any left out."""
    order = scorer.by_depth
    found = {row: [k for k in order[depth + 1 :] if wanted[row, k]] for depth, row in enumerate(order)}
    return {row: columns for row, columns in found.items() if columns}


def _row(scorer: Scorer, batch: Batch, row: int, columns: list[int]) -> Cell:
    """Measure one column together with deeper ones, on one batch."""
    base = scorer.base(batch)
    _, below = scorer.run(base.environment, row, keep=True)
    losses = [
        scorer.losses(base, scorer.run(below, column, on_top_of=row)[0], batch.images).cpu().numpy()
        for column in columns
    ]
    return {"losses": np.stack(losses), "evaluations": scorer.take_spent(len(batch.images))}
