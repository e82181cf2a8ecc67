"""`fit`: trace of the Fisher matrix times the power of rounding noise, weights and activations on one scale (FIT)."""

from __future__ import annotations

import numpy as np

from fxquant.passes.sensitivity.cell_sweep import Cell
from fxquant.passes.sensitivity.leaves import Leaves, activation_noise, weight_noise
from fxquant.passes.sensitivity.mpqco import label_cotangents
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Batch, Scorer


@estimator("fit", float_only=True, curvature=True)
def fit(scorer: Scorer) -> Estimate:
    """Return `values = diag(sum over tensors of E|g|^2 mean(d^2) / 2)`, about 3 passes per image.

    g is the gradient of log p(y) of one image in the weight or in a value the column rounds, y sampled from the model,
    so that `E|g|^2` is the trace of the Fisher matrix (Zandonati et al., arXiv 2210.08502, equation 7, whose noise
    `step^2 / 12` is measured here). The half, which FIT leaves out, puts it in units of the loss.
    """
    found = scorer.by_batch("gradients image by image", "fit", _cell)
    noise = np.hstack([weight_noise(scorer), found.total("noise") / len(scorer.images)])
    return Estimate.diagonal(noise @ found.joined("squares") / 2, found.evaluations)


def _cell(scorer: Scorer, batch: Batch) -> Cell:
    images = batch.images
    cotangents = label_cotangents(scorer, batch, scorer.base(batch).answer)
    spent = scorer.take_spent(len(images))
    squares, noise = [], []
    # One image at a time: a batch's gradient of a weight is a sum, and its square is not the sum of squares.
    for k in range(len(images)):
        leaves = Leaves(scorer, images.slice(k, k + 1))
        found = leaves.gradients((leaves.answer * cotangents[k : k + 1]).sum())
        squares.append([float(g.double().square().sum()) for g in found])
        noise.append(activation_noise(scorer, leaves.environment, 1))
        scorer.replay.spent += scorer.network_cost
    evaluations = spent + scorer.take_spent(1)
    return {"squares": np.array(squares).T, "noise": np.sum(noise, axis=0), "evaluations": evaluations}
