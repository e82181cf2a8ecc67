"""`hybrid`: pairs measured where they matter, the Gram elsewhere, and an error bar from a sample of the rest.

The single substitutions predict every pair (see `gram`). The pairs of largest predicted interaction, mostly two low
widths, are measured exactly until the budget of evaluations is spent; of the others a random sample is measured too. It
says how far the predictions are off, and its regression slope scales those that stay predictions: measured
interactions are smaller than predicted ones where the loss saturates. Measured and predicted terms together are scaled
until the model never gains by giving up bits (see `monotone`): the negative ones among them would be credited twice,
for their pairs were picked for their size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fxquant.passes.sensitivity.columns import Column
from fxquant.passes.sensitivity.monotone import repaired
from fxquant.passes.sensitivity.pairs import measure_pairs
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Scorer, standard_error
from fxquant.passes.sensitivity.singles import measure_singles

PAIRS_PER_SINGLE = 4.0
"""Evaluations spent on pairs, the sample included, at most this many times those of the single substitutions."""

SAMPLED = 48
"""Pairs measured at random among those that are not measured for their size."""


@estimator("hybrid", has_pairs=True, measured=True)
def hybrid(scorer: Scorer) -> Estimate:
    """Return measured pairs where the predicted interaction is largest, scaled predictions elsewhere.

    `notes`: `measured_pairs` and `all_pairs`; of the random sample `sample_error`, the root mean square of prediction
    minus measurement after scaling, `sample_size_of_terms`, the root mean square of the measured interactions,
    `scale`, the slope that predictions were multiplied by, and `mean_share` of the pair terms that the repair keeps.
    """
    singles = measure_singles(scorer)
    predicted = np.where(scorer.between, (singles.gram + singles.gram.T) / 2, 0.0)
    cost = np.array([suffix_cost(scorer, column) for column in scorer.columns])
    budget = PAIRS_PER_SINGLE * singles.evaluations / len(scorer.images)
    sample, chosen = choose_pairs(predicted, scorer.between, cost, budget, scorer.seed)
    found = measure_pairs(scorer, sample | chosen)
    measured = found.interaction.mean(axis=2)
    scale = slope(predicted[sample], measured[sample])
    interaction = np.where(found.measured, measured, scale * predicted)
    error = float(np.sqrt(np.mean((scale * predicted - measured)[sample] ** 2))) if sample.any() else 0.0
    off = np.where(found.measured, standard_error(found.interaction) / 2, error / 2)
    values, shares = repaired(found, interaction / 2 + np.diag(singles.losses.mean(axis=1)))
    stderr = np.where(scorer.between, off, np.diag(standard_error(singles.losses)))
    notes = {
        "measured_pairs": float(found.measured.sum() / 2),
        "all_pairs": float(scorer.between.sum() / 2),
        "sample_error": error,
        "sample_size_of_terms": float(np.sqrt(np.mean(measured[sample] ** 2))) if sample.any() else 0.0,
        "scale": scale,
        "mean_share": float(shares.mean()),
    }
    return Estimate(values, stderr, found.evaluations, notes)


def choose_pairs(
    predicted: NDArray[np.float64],
    between: NDArray[np.bool_],
    cost: NDArray[np.float64],
    budget: float,
    seed: int,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the pairs measured at random, and those measured for their size, as symmetric masks.

    Args:
        predicted: shape (m, m), symmetric: predicted interactions.
        between: shape (m, m), symmetric: which pairs there are.
        cost: shape (m,): passes to run a column; a pair costs the smaller of the two.
        budget: passes that all chosen pairs may cost together.
        seed: of the sample.
    """
    first, second = np.nonzero(np.triu(between, k=1))
    price = np.minimum(cost[first], cost[second])
    # A sample that ate the whole budget would leave nothing for the pairs that matter.
    random = np.random.default_rng(seed).permutation(len(first))[:SAMPLED]
    random = random[np.cumsum(price[random]) <= budget / 4]
    left = budget - price[random].sum()
    rest = np.setdiff1d(np.arange(len(first)), random)
    rest = rest[np.argsort(-np.abs(predicted[first[rest], second[rest]]), kind="stable")]
    largest = rest[np.cumsum(price[rest]) <= left]
    masks = []
    for picked in (random, largest):
        mask = np.zeros_like(between)
        mask[first[picked], second[picked]] = mask[second[picked], first[picked]] = True
        masks.append(mask)
    return masks[0], masks[1]


def slope(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float:
    """Return the least-squares slope of measured over predicted, within 0..1; 1 where there is nothing to fit."""
    weight = float(predicted @ predicted)
    return float(np.clip(predicted @ measured / weight, 0.0, 1.0)) if weight > 0 else 1.0


def suffix_cost(scorer: Scorer, column: Column) -> float:
    """Return what running a column alone takes, in whole-network passes: the nodes downstream of what it changes."""
    fresh = {scorer.replay.by_name[name] for name in column.substitution}
    for node in scorer.replay.nodes:
        if any(source in fresh for source in node.all_input_nodes):
            fresh.add(node)
    return sum(scorer.costs[node.name] for node in fresh) / scorer.network_cost
