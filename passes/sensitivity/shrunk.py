"""`shrunk`: measured pairs, each shrunk towards zero by twice its standard error.

An interaction is a small difference of large losses. The solver favours plans whose errors are in its favour: it
collects the pairs that came out too negative by chance. Only what exceeds the noise counts (soft thresholding, as CoopQ
shrinks its covariances; arXiv 2509.15455).
"""

from __future__ import annotations

import numpy as np

from fxquant.passes.sensitivity.pairs import PairRuns, pair_model
from fxquant.passes.sensitivity.registry import Estimate
from fxquant.passes.sensitivity.scorer import standard_error

ERRORS = 2.0
"""Standard errors that an interaction is shrunk by."""


@pair_model("shrunk")
def shrunk_pairs(runs: PairRuns) -> Estimate:
    """Return `sign(W) max(|W| - 2 stderr(W), 0)` for every pair."""
    mean, error = runs.interaction.mean(axis=2), standard_error(runs.interaction)
    # The noise of one image is unknown: nothing is shrunk.
    kept = np.sign(mean) * np.maximum(np.abs(mean) - ERRORS * np.nan_to_num(error), 0.0)
    share = float(np.abs(kept).sum() / max(float(np.abs(mean).sum()), 1e-300))
    values = kept / 2 + np.diag(runs.alone.mean(axis=1))
    return Estimate(values, runs.stderr, runs.evaluations, {"kept_share": share})
