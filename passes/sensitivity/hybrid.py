"""`hybrid`: the pairs that matter measured, the Gram elsewhere, and an error bar from a random sample.

The single substitutions predict every pair (see `gram`). The pairs of largest predicted interaction, mostly two low
widths, are measured until the budget of evaluations is spent, and so is a random sample of the others. The sample shows
the error of the predictions, and its regression slope scales those that are not measured: measured interactions are
smaller than predicted ones where the loss saturates. All pair terms are then scaled until the model never gains by
giving up bits (see `monotone`), because pairs that were picked for their size overstate the negative terms.
"""

from __future__ import annotations

import numpy as np

from fxquant.passes.sensitivity.monotone import repaired
from fxquant.passes.sensitivity.pair_choice import choose_pairs, slope, suffix_cost
from fxquant.passes.sensitivity.pairs import measure_pairs
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Scorer, standard_error
from fxquant.passes.sensitivity.singles import measure_singles

PAIRS_PER_SINGLE = 4.0
"""Evaluations spent on pairs, the sample included, at most this many times those of the single substitutions."""


@estimator("hybrid", has_pairs=True, measured=True, work="own")
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
