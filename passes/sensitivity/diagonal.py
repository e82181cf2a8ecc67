"""`diagonal`: the measured loss of each substitution, no interactions (ZeroQ; CLADO without cross terms)."""

from __future__ import annotations

from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Scorer
from fxquant.passes.sensitivity.singles import measure_singles


@estimator("diagonal", measured=True)
def diagonal(scorer: Scorer) -> Estimate:
    """Return `values = diag(E_x loss(i))`, m runs per image (Cai et al., ZeroQ, arXiv 2001.00281)."""
    singles = measure_singles(scorer)
    return Estimate.diagonal(singles.losses, singles.evaluations)
