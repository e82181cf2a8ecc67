"""`gram`: measured diagonal, and every pair from inner products of logit shifts.

With `loss(shift) ~ shift' F shift / 2` and F = diag p - p p' (Gauss-Newton for KL), two substitutions that shift the
output by d_i and d_j interact by `d_i' F d_j`: all pairs from n runs instead of n^2 / 2.
"""

from __future__ import annotations

import numpy as np

from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Scorer, standard_error
from fxquant.passes.sensitivity.singles import measure_singles


@estimator("gram", has_pairs=True, measured=True)
def gram(scorer: Scorer) -> Estimate:
    """Return `values[i, i] = E loss(i)`, `values[i, j] = E e_i . e_j / 2` between owners, m runs per image."""
    singles = measure_singles(scorer)
    values = np.where(scorer.between, (singles.gram + singles.gram.T) / 4, np.diag(singles.losses.mean(axis=1)))
    stderr = np.where(scorer.between, singles.gram_stderr / 2, np.diag(standard_error(singles.losses)))
    return Estimate(values, stderr, singles.evaluations)
