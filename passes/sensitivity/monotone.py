"""`monotone`: measured pairs, scaled down until the model never gains by giving a site fewer bits.

Pair terms of a saturating loss are negative. Summed over many sites they outweigh the losses of single sites, and the
model then predicts that more damage lowers the loss. Widening site i from b to b' changes the model by at most

    (V_ii(b') - V_ii(b)) + 2 t sum over j of max over c of (V_ij(b', c) - V_ij(b, c)),

which must not be positive: t_i is the largest share of its pair terms in 0..1 that keeps it so, whatever the other
sites do, and a pair is scaled by the smaller of the two shares. Single losses are first made to fall with bits
(isotonic regression), as LIMPQ (arXiv 2203.08368) forbids inverted choices.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fxquant.passes.sensitivity.pairs import PairRuns, pair_model
from fxquant.passes.sensitivity.registry import Estimate


@pair_model("monotone")
def monotone_pairs(runs: PairRuns) -> Estimate:
    """Return the pair matrix with its pair terms scaled."""
    values, shares = repaired(runs, runs.values)
    return Estimate(values, runs.stderr, runs.evaluations, {"mean_share": float(shares.mean())})


def repaired(runs: PairRuns, values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a matrix over the columns made monotone, and the share of its pair terms each owner keeps.

    Args:
        runs: what the matrix was made of.
        values: shape (m, m), symmetric.
    """
    owners = np.array(runs.owners)
    groups = [np.flatnonzero(owners == owner) for owner in dict.fromkeys(runs.owners)]
    found, shares = repair(values, groups)
    for group in groups:
        # What the context has anyway costs nothing there, whatever its neighbours in bits were averaged with.
        own = [k for k in group if not runs.alone[k].any()]
        if own:
            found[group, group] -= found[own[0], own[0]]
    return found, shares


def repair(
    values: NDArray[np.float64], groups: list[NDArray[np.intp]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the matrix with its pair terms scaled, and the share that each group keeps.

    Args:
        values: shape (m, m), symmetric.
        groups: the columns of each owner, from few bits to many.
    """
    off = values.copy()
    np.fill_diagonal(off, 0.0)
    diagonal, shares = np.diag(values).copy(), np.ones(len(groups))
    for k, group in enumerate(groups):
        diagonal[group] = falling(diagonal[group])
        for narrow, wide in pairwise(group):
            gain = diagonal[narrow] - diagonal[wide]
            change = 2 * (off[wide] - off[narrow])
            worst = sum(max(float(change[other].max()), 0.0) for j, other in enumerate(groups) if j != k)
            if worst > gain:
                shares[k] = min(shares[k], gain / worst)
    scale = np.ones(len(values))
    for share, group in zip(shares, groups, strict=True):
        scale[group] = share
    return off * np.minimum(scale[:, None], scale[None, :]) + np.diag(diagonal), shares


def falling(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the nearest sequence that never rises (least squares: neighbours that do are averaged)."""
    blocks: list[tuple[float, int]] = []
    for loss in losses:
        mean, count = float(loss), 1
        while blocks and blocks[-1][0] < mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    return np.array([mean for mean, count in blocks for _ in range(count)], dtype=np.float64)
