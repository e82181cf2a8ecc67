"""`diagonal`: the measured loss of each substitution, no interactions (ZeroQ; CLADO without cross terms)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fxquant.core.losses import UNITS
from fxquant.core.sensitivity import SensitivityMatrix
from fxquant.passes.sensitivity.registry import ESTIMATORS
from fxquant.passes.sensitivity.scorer import Scorer
from fxquant.passes.sensitivity.singles import measure_singles


def standard_error(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard error of the mean over the last axis; NaN for a single sample."""
    if samples.shape[-1] < 2:
        return np.full(samples.shape[:-1], np.nan)
    return np.asarray(samples.std(axis=-1, ddof=1) / np.sqrt(samples.shape[-1]), dtype=np.float64)


@ESTIMATORS.register("diagonal")
def diagonal(scorer: Scorer) -> SensitivityMatrix:
    """Return `values = diag(E_x loss(i))`, n runs per image (Cai et al., ZeroQ, arXiv 2001.00281)."""
    singles = measure_singles(scorer)
    return SensitivityMatrix(
        scorer.candidates,
        np.diag(singles.losses.mean(axis=1)),
        np.diag(standard_error(singles.losses)),
        "diagonal",
        singles.evaluations,
        UNITS[scorer.loss],
    )
