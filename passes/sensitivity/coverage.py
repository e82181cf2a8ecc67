"""`coverage`: CLADO's measured pairs where the loss saturates, by a link that makes damage add up.

A bounded loss behaves like coverage: two perturbations that each ruin half of the answers ruin three quarters together,
not all of them. With the ceiling c,

    loss(S) = c (1 - exp(-u(S))),    u(S) = -log(1 - loss(S) / c),

u adds up where the loss saturates (Hill, arXiv 2607.12266, with terms for single sites only), so its pair terms by the
four-term identity hold what truly interacts, and stay small where those of the loss itself turn large and negative and
a quadratic credits them many times over. The link is monotone: the plan of least u is the plan of least loss.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fxquant.passes.sensitivity.pairs import PairRuns, pair_model
from fxquant.passes.sensitivity.registry import Estimate
from fxquant.passes.sensitivity.scorer import standard_error

HEADROOM = 1.5
"""Ceiling over the largest mean loss that was measured: whole plans are worse than any pair."""


@pair_model("coverage", unit="coverage units")
def coverage_pairs(runs: PairRuns) -> Estimate:
    """Return the pair matrix of u; `notes` hold the ceiling."""
    alone, start = runs.alone.mean(axis=1), runs.context_loss
    means = np.where(runs.measured, runs.joint.mean(axis=2), 0.0)
    ceiling = HEADROOM * (start + max(float(alone.max()), float(means.max()), 1e-12))
    single, both, base = (link(start + x, ceiling) for x in (alone, means, np.zeros(1)))
    interaction = np.where(runs.measured, both - single[:, None] - single[None] + base, 0.0)
    # The link's slope turns the standard error of a loss into that of u.
    slope = 1.0 / (ceiling * (1.0 - np.clip((start + means) / ceiling, 0.0, 0.99)))
    stderr = standard_error(runs.interaction) / 2 * slope
    stderr += np.diag(standard_error(runs.alone) / (ceiling - np.minimum(start + alone, 0.99 * ceiling)))
    values = interaction / 2 + np.diag(single - base)
    return Estimate(values, stderr, runs.evaluations, {"ceiling": ceiling}, float(base[0]))


def link(loss: NDArray[np.float64], ceiling: float) -> NDArray[np.float64]:
    """Return `u = -log(1 - loss / ceiling)`, monotone in the loss and 0 at 0; losses below 0 give negative u."""
    return np.asarray(-np.log1p(-np.minimum(loss / ceiling, 0.999)), dtype=np.float64)
