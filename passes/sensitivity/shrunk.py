"""`shrunk`: measured pairs, each drawn towards zero by twice its standard error.

An interaction is the small difference of large losses, and the solver picks the plan whose errors flatter it most: of
hundreds of pairs it collects those that came out too negative by chance. Only what exceeds the noise is credited
(soft thresholding, as CoopQ shrinks its covariances; arXiv 2509.15455).
"""

from __future__ import annotations

import numpy as np

from fxquant.core.facts import SensitivityMatrix
from fxquant.passes.sensitivity.pairs import measure_pairs
from fxquant.passes.sensitivity.registry import ESTIMATORS
from fxquant.passes.sensitivity.scorer import Scorer, standard_error

ERRORS = 2.0
"""Standard errors that an interaction is drawn towards zero by."""


@ESTIMATORS.register("shrunk")
def shrunk(scorer: Scorer) -> SensitivityMatrix:
    """Return `sign(W) max(|W| - 2 stderr(W), 0)` for every pair; costs what `pairs` costs, and shares its cells."""
    found = measure_pairs(scorer, scorer.between)
    interaction, alone = found.interaction, found.singles.losses
    mean, error = interaction.mean(axis=2), standard_error(interaction)
    # From one image nothing is known of the noise, and nothing is drawn.
    kept = np.sign(mean) * np.maximum(np.abs(mean) - ERRORS * np.nan_to_num(error), 0.0)
    values = kept / 2 + np.diag(alone.mean(axis=1))
    stderr = error / 2 + np.diag(standard_error(alone))
    share = float(np.abs(kept).sum() / max(float(np.abs(mean).sum()), 1e-300))
    return scorer.matrix("shrunk", values, stderr, found.evaluations, {"kept_share": share})
