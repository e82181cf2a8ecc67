"""`diagonal`: the measured loss of each substitution, no interactions (ZeroQ; CLADO without cross terms)."""

from __future__ import annotations

import numpy as np

from fxquant.core.facts import SensitivityMatrix
from fxquant.passes.sensitivity.registry import ESTIMATORS
from fxquant.passes.sensitivity.scorer import Scorer, standard_error
from fxquant.passes.sensitivity.singles import measure_singles


@ESTIMATORS.register("diagonal")
def diagonal(scorer: Scorer) -> SensitivityMatrix:
    """Return `values = diag(E_x loss(i))`, m runs per image (Cai et al., ZeroQ, arXiv 2001.00281)."""
    singles = measure_singles(scorer)
    return scorer.matrix(
        "diagonal",
        np.diag(singles.losses.mean(axis=1)),
        np.diag(standard_error(singles.losses)),
        singles.evaluations,
    )
