"""`orm`: layers whose features are unlike those of all other layers get more bits (OMPQ's orthogonality metric).

Likeness of two layers is linear CKA of their answers, invariant to rotations, scales and shifts of either. The paper's
estimator of it is biased: with fewer images than features even independent features look alike (0.65 at 32 images and
60 features). Here the unbiased estimator of HSIC is summed over small batches, which also bounds the memory.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity.cell_sweep import Cell, Gathered
from fxquant.passes.sensitivity.layer_features import jackknife_error, layer_features, priced_bits
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Scorer

TOGETHER = 16
"""Most images that are compared with each other."""
FEWEST = 4
"""Images without which the unbiased estimator is not defined."""
BETA = 1.0
"""Steepness of `exp(-beta gamma)`; the paper tunes it by network, from 1 to 10."""

FloatArray = NDArray[np.float64]


@estimator("orm", float_only=True, unit="bits x orthogonality", work="own")
def orm(scorer: Scorer) -> Estimate:
    """Return `values = diag(c_l (32 - bits))`, one pass per image, no labels (Ma et al., OMPQ, arXiv 2109.07865).

    `ORM_ij = HSIC(i, j) / sqrt(HSIC(i, i) HSIC(j, j))`, `gamma_i = sum over j != i of ORM_ij`,
    `theta_i = exp(-beta gamma_i)`, and c_l is the mean of theta over layer l and the layers behind it: the objective
    `max sum c_l bits_l` of the paper's linear program. HSIC is Song's unbiased estimator, summed over batches as Nguyen
    et al. do (arXiv 2010.15327). Bits of activations, which the paper fixes, count like those of the layer's weights.
    Fewer than 4 images cannot tell layers apart: all get the same price. Standard errors are the jackknife's over
    images.
    """
    parts = -(-len(scorer.images) // TOGETHER)
    bounds = [len(scorer.images) * k // parts for k in range(parts + 1)]
    work = {f"orm-{k}": partial(_cell, scorer, scorer.images.slice(*bounds[k : k + 2])) for k in range(parts)}
    found = Gathered(list(scorer.measure("likeness of layers", work).values()))
    total, own = found.total("hsic"), [cell["hsic"] for cell in found.cells]
    without = [
        orthogonality(total - part + cell["without"][..., k])
        for part, cell in zip(own, found.cells, strict=True)
        for k in range(cell["without"].shape[-1])
    ]
    enough = min(np.diff(bounds)) > FEWEST
    errors = jackknife_error(np.stack(without, axis=-1)) if enough else np.full(len(total), np.nan)
    return priced_bits(scorer, orthogonality(total), errors, found.evaluations)


def orthogonality(hsic: FloatArray) -> FloatArray:
    """Return c of every layer, shape (layers,), in (0, inf), from HSIC of shape (layers, layers) up to a factor."""
    size = np.sqrt(np.maximum(np.diag(hsic), 0.0))
    # A layer that answers the same to every image is like no other.
    known = np.outer(size, size) > 0
    likeness = np.where(known, hsic / np.where(known, np.outer(size, size), 1.0), 0.0)
    gamma = likeness.sum(axis=1) - np.diag(likeness)
    theta = np.exp(-BETA * gamma)
    return np.asarray(theta[::-1].cumsum()[::-1] / np.arange(len(theta), 0, -1), dtype=np.float64)


def unbiased_hsic(grams: Tensor) -> Tensor:
    """Return Song's unbiased `HSIC(i, j) = sum over a != b of K_i K_j / (n (n - 3))`, float64 of shape (m, m).

    K are the Gram matrices, U-centred (Szekely and Rizzo, arXiv 1310.2926): without their diagonal,
    `K_ab - row_a / (n - 2) - row_b / (n - 2) + total / ((n - 1) (n - 2))`.

    Args:
        grams: inner products of n samples' features, shape (m, n, n); zeros are returned for n below 4.
    """
    count = grams.shape[-1]
    if count < FEWEST:
        return torch.zeros(len(grams), len(grams), dtype=torch.float64)
    apart = 1.0 - torch.eye(count, dtype=torch.float64)
    bare = grams * apart
    rows = bare.sum(dim=2) / (count - 2)
    total = rows.sum(dim=1) / (count - 1)
    centred = (bare - rows[:, :, None] - rows[:, None, :] + total[:, None, None]) * apart
    flat = centred.flatten(1)
    return flat @ flat.T / (count * (count - 3))


def _cell(scorer: Scorer, images: CalibrationSet) -> Cell:
    summaries = layer_features(scorer, images, _gram)
    nothing = torch.zeros(len(images), len(images), dtype=torch.float64)
    # The features of a layer that is used several times lie side by side.
    grams = torch.stack([sum(each, nothing) for each in summaries.values()])
    rest = [[k for k in range(len(images)) if k != left_out] for left_out in range(len(images))]
    without = [unbiased_hsic(grams[:, keep][:, :, keep]) for keep in rest]
    return {
        "hsic": unbiased_hsic(grams).numpy(),
        "without": torch.stack(without, dim=-1).numpy(),
        "evaluations": scorer.take_spent(len(images)),
    }


def _gram(features: Tensor, _: int) -> Tensor:
    flat = features.flatten(1)
    return (flat @ flat.T).cpu()
