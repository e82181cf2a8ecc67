"""`monotone`: measured pairs, scaled down until the model never gains by giving a site fewer bits.

Pair terms of a saturating loss are negative. Summed over many sites they outweigh the losses of single sites, and the
quadratic says that more damage is better. Widening site i from b to b' changes the model by at most

    (V_ii(b') - V_ii(b)) + 2 t sum over j of max over c of (V_ij(b', c) - V_ij(b, c)),

which must not be positive: t_i is the largest share of its pair terms in 0..1 that keeps it so, whatever the other
sites do, and a pair is scaled by the smaller of the two shares. Single losses are first made to fall with bits
(isotonic regression), as LIMPQ (arXiv 2203.08368) forbids inverted choices.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fxquant.core.facts import SensitivityMatrix
from fxquant.passes.sensitivity.pairs import measure_pairs
from fxquant.passes.sensitivity.registry import ESTIMATORS
from fxquant.passes.sensitivity.scorer import Scorer, standard_error


@ESTIMATORS.register("monotone")
def monotone(scorer: Scorer) -> SensitivityMatrix:
    """Return the pair matrix with its pair terms scaled; costs what `pairs` costs, and shares its cells."""
    found = measure_pairs(scorer, scorer.between)
    interaction, alone = found.interaction, found.singles.losses
    values = interaction.mean(axis=2) / 2 + np.diag(alone.mean(axis=1))
    values, shares = repaired(scorer, values, alone)
    stderr = standard_error(interaction) / 2 + np.diag(standard_error(alone))
    return scorer.matrix("monotone", values, stderr, found.evaluations, {"mean_share": float(shares.mean())})


def repaired(
    scorer: Scorer, values: NDArray[np.float64], alone: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a matrix over the scorer's columns made monotone, and the share of its pair terms each owner keeps.

    Args:
        scorer: what measured it.
        values: shape (m, m), symmetric.
        alone: shape (m, images): single losses.
    """
    owners = np.array(scorer.owners)
    groups = [np.flatnonzero(owners == owner) for owner in dict.fromkeys(scorer.owners)]
    found, shares = repair(values, groups)
    for group in groups:
        # What stands in the context anyway costs nothing there, whatever its neighbours in bits were averaged with.
        standing = [k for k in group if not alone[k].any()]
        if standing:
            found[group, group] -= found[standing[0], standing[0]]
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
