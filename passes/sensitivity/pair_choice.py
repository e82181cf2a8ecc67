"""Which pairs to measure within a budget of passes: those of largest predicted interaction, and a random sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fxquant.passes.sensitivity.columns import Column
from fxquant.passes.sensitivity.scorer import Scorer

SAMPLED = 48
"""Pairs measured at random among those that are not measured for their size."""


def choose_pairs(
    predicted: NDArray[np.float64], between: NDArray[np.bool_], cost: NDArray[np.float64], budget: float, seed: int
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
    # A quarter at most, so that most of the budget goes to the largest pairs.
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
