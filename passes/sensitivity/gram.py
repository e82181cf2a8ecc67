"""`gram`: measured diagonal, and every pair from inner products of logit shifts.

With `loss(shift) ~ shift' F shift / 2` and F = diag p - p p' (Gauss-Newton for KL), two substitutions that shift the
output by d_i and d_j interact by `d_i' F d_j`: all pairs from n runs instead of n^2 / 2.
"""

from __future__ import annotations

import numpy as np

from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Scorer, standard_error
from fxquant.passes.sensitivity.singles import measure_singles
from fxquant.passes.sensitivity.thinned import thinned


@estimator("gram", has_pairs=True, measured=True)
def gram(scorer: Scorer) -> Estimate:
    """Return `values[i, i] = E loss(i)`, `values[i, j] = E e_i . e_j / 2` between owners, m runs per image.

    Where the scorer says so, wide columns are run on some of the batches (`thinned`).
    """
    if scorer.wide_every > 1:
        losses, products, evaluations = thinned(scorer)
        stderr = np.full(products.shape, np.nan)
    else:
        singles = measure_singles(scorer)
        losses, products, stderr, evaluations = (
            singles.losses,
            singles.gram,
            singles.gram_stderr / 2,
            singles.evaluations,
        )
    values = np.where(scorer.between, (products + products.T) / 4, np.diag(np.nanmean(losses, axis=1)))
    own = np.diag(np.array([standard_error(row[~np.isnan(row)]) for row in losses]))
    return Estimate(values, np.where(scorer.between, stderr, own), evaluations)
