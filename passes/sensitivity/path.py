"""`path`: attribution along the way to the fully quantized network, in a model of the loss that saturates.

Losses of single substitutions do not say what a plan costs that rounds everything: the loss has a ceiling, and single
losses at low widths add up to more than it. Hill (arXiv 2607.12266) models the loss of a set of substitutions as
coverage, `L = c (1 - product of (1 - a_i))`, so that `u = -log(1 - a)` adds up. The loss of a format (see `walk`)
gives the sum of its u, and the attributions phi of its walk say what share each owner has.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Scorer
from fxquant.passes.sensitivity.walk import formats, walk

Floats = NDArray[np.float64]
HEADROOM = 1.05
"""The ceiling lies this much above the largest loss seen, so that no loss lies on it."""


@estimator("path", float_only=True, unit="coverage (-log)")
def path(scorer: Scorer) -> Estimate:
    """Return `values = diag(u)`, `u_i = U phi_i+ / sum phi+` with `U = -log(1 - L / c)`, 6 passes per format and image.

    The ceiling c is 1.05 times the largest mean loss of the formats and of an answer that is 0 everywhere (uniform
    scores). Standard errors are the jackknife's over images, c held fixed. A loss that is below 0 (cross-entropy)
    counts as 0. Notes hold the ceiling and the largest `|sum phi - L| / c`, the error of the quadrature.
    """
    plans, variance = formats(scorer), np.zeros(len(scorer.columns))
    found = scorer.by_batch("walk to the quantized network", "path", partial(walk, plans=plans))
    phi, losses, images = found.joined("phi"), found.joined("losses"), len(scorer.images)
    worst = max(float(each.mean()) for each in (*losses, found.joined("flat")))
    ceiling, values = HEADROOM * max(worst, float(np.finfo(np.float32).tiny)), np.zeros_like(variance)
    # An owner with few choices stays at its widest in later formats; what it has of the first one counts, and is last.
    for plan, shares, whole in reversed(list(zip(plans, phi, losses, strict=True))):
        values[plan] = attribution(shares.mean(axis=1), whole.mean(), ceiling)
        others = (shares.sum(axis=1, keepdims=True) - shares) / max(images - 1, 1)
        left_out = attribution(others, (whole.sum() - whole) / max(images - 1, 1), ceiling)
        variance[plan] = (images - 1) * left_out.var(axis=1) if images > 1 else np.nan
    gap = float(np.abs(phi.sum(axis=1).mean(axis=1) - losses.mean(axis=1)).max()) / ceiling
    notes = {"ceiling": ceiling, "quadrature_error": gap}
    return Estimate(np.diag(values), np.diag(np.sqrt(variance)), found.evaluations, notes)


def attribution(phi: Floats, loss: Floats, ceiling: float) -> Floats:
    """Return `u_i = -log(1 - loss / ceiling) phi_i+ / sum phi+`, shape (owners, ...); 0 if no phi is above 0."""
    positive = np.maximum(phi, 0.0)
    total = positive.sum(axis=0)
    # Left out of the mean, an image may lift the others' loss to the ceiling and above.
    covered = np.clip(loss / ceiling, 0.0, 1.0 - 1e-9)
    share = np.divide(positive, total, out=np.zeros_like(positive), where=np.broadcast_to(total > 0, positive.shape))
    return np.asarray(-np.log1p(-covered) * share, dtype=np.float64)
