"""`pairs`: CLADO's exact pair terms by the four-term identity (Deng et al., arXiv 2307.05657, section 3).

`W_ij = loss(i and j) - loss(i) - loss(j)` (the base loss is 0 for losses against the float model). The run of
(i, b) is kept, and each (j, c) is replayed on top of it from j on: the same numbers as whole forwards, at about a
third of their work. With cross-entropy the matrix is projected to the nearest positive semidefinite one, as the paper
does; with KL it is left as measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxquant.core.losses import UNITS
from fxquant.core.sensitivity import SensitivityMatrix
from fxquant.passes.sensitivity.diagonal import standard_error
from fxquant.passes.sensitivity.gram import same_site
from fxquant.passes.sensitivity.registry import ESTIMATORS
from fxquant.passes.sensitivity.scorer import Part, Scorer
from fxquant.passes.sensitivity.singles import measure_singles


@ESTIMATORS.register("pairs")
def pairs(scorer: Scorer) -> SensitivityMatrix:
    """Return the measured pair matrix, `n + pairs between sites` runs per image."""
    singles = measure_singles(scorer)
    size, images = len(scorer.candidates), singles.losses.shape[1]
    joint = np.zeros((size, size, images))
    evaluations, start = singles.evaluations, 0
    work = [(part, row) for part in scorer.parts for row in scorer.by_depth]
    for part, row in scorer.reporter.track(work, "score pairs of choices", len(work)):
        if row == scorer.by_depth[0]:
            start = part.index * scorer.batch
        cell = _row(scorer, part, row)
        columns = cell["columns"].astype(np.intp)
        joint[row, columns, start : start + len(part.images)] = cell["losses"]
        evaluations += float(cell["evaluations"])
    # Each pair was run once, in the order of depth; the other half mirrors it.
    joint = joint + joint.transpose(1, 0, 2)
    between = ~same_site([c.site for c in scorer.candidates])
    interaction = np.where(between[:, :, None], joint - singles.losses[:, None] - singles.losses[None], 0.0)
    values = interaction.mean(axis=2) / 2 + np.diag(singles.losses.mean(axis=1))
    stderr = standard_error(interaction) / 2 + np.diag(standard_error(singles.losses))
    if scorer.loss == "ce":
        values = positive_part(values)
    return SensitivityMatrix(
        scorer.candidates, (values + values.T) / 2, stderr, "pairs", evaluations, UNITS[scorer.loss]
    )


def positive_part(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the nearest positive semidefinite matrix: negative eigenvalues set to zero (the paper's step)."""
    eigenvalues, vectors = np.linalg.eigh((values + values.T) / 2)
    return np.asarray((vectors * np.maximum(eigenvalues, 0.0)) @ vectors.T, dtype=np.float64)


def _row(scorer: Scorer, part: Part, row: int) -> dict[str, NDArray[Any]]:
    """Measure one candidate together with every candidate of a deeper site, on one batch."""
    key = f"pairs-{part.index}-{row}"
    known = scorer.store.get(key)
    if known is not None:
        return known
    reference, base = scorer.base(part)
    _, below = scorer.run(base, row, keep=True)
    site = scorer.candidates[row].site
    depth = scorer.by_depth.index(row)
    columns = [k for k in scorer.by_depth[depth + 1 :] if scorer.candidates[k].site != site]
    losses = [
        scorer.losses(reference, scorer.run(below, column, on_top_of=row)[0], part.images).numpy() for column in columns
    ]
    return scorer.store.put(
        key,
        {
            "columns": np.array(columns, dtype=np.int64),
            "losses": np.stack(losses) if losses else np.zeros((0, len(part.images))),
            "evaluations": scorer.take_spent(len(part.images)),
        },
    )
