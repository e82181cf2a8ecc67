"""`sqnr`: noise-to-signal power of the network's answer, each substitution alone (AIMET's mixed precision, phase 1).

AIMET ranks by the ratio of signal to noise in dB. Its inverse is kept here as a plain ratio: independent noises add
up, so ratios can be summed over sites; the order of the choices is the same.
"""

from __future__ import annotations

import numpy as np

from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Scorer, standard_error
from fxquant.passes.sensitivity.singles import measure_singles


@estimator("sqnr", float_only=True, unit="noise-to-signal power")
def sqnr(scorer: Scorer) -> Estimate:
    """Return `values = diag(E|shift_i|^2 / E|answer|^2)`, m runs per image (Pandey et al., arXiv 2302.05397, 3.1)."""
    singles = measure_singles(scorer)
    signal = max(float(singles.answer_power.mean()), float(np.finfo(np.float32).tiny))
    ratio = singles.shift_power.mean(axis=1) / signal
    # The standard error of a ratio of means is that of the residuals of each image.
    residuals = (singles.shift_power - ratio[:, None] * singles.answer_power) / signal
    return Estimate(np.diag(ratio), np.diag(standard_error(residuals)), singles.evaluations)
