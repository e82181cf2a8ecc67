"""`separability` and `separability_exp`: layers whose channels tell images apart get more bits, or fewer (CSMPQ).

Channels of a layer are taken as words and images as texts. A channel that answers to few images, and to those strongly,
separates them: the tf-idf score of text retrieval. No labels are used, in spite of the paper's "class separability".

The paper says that layers of lower separability can do with fewer bits, and its scripts for training take the score as
the price of a bit. Its scripts for post-training quantization take `exp(-beta score)`, the opposite order. Both are
here: `separability` and `separability_exp`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxquant.core.ir import Sites
from fxquant.passes.sensitivity.cell_sweep import Cell, Gathered
from fxquant.passes.sensitivity.layer_features import jackknife_error, layer_features, priced_bits
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Scorer

IMAGES = 64
"""Images that are looked at: the first ones."""
BETA = 1.0
"""Steepness of `exp(-beta score)`; the paper tunes it by network."""

FloatArray = NDArray[np.float64]


@estimator("separability", float_only=True, unit="bits x separability", work="own")
def separability(scorer: Scorer) -> Estimate:
    """Return `values = diag(s_l (32 - bits))`, one pass over at most 64 images (Wang et al., CSMPQ, arXiv 2212.10220).

    s_l is `tf_idf` of the layer's answers, 0 where that is negative. Bits of activations, which the paper fixes, count
    like those of the layer's weights. Standard errors are the jackknife's over images.
    """
    return _priced(scorer, lambda scores: np.maximum(scores, 0.0))


@estimator("separability_exp", float_only=True, unit="bits x exp(-separability)", work="own")
def separability_exp(scorer: Scorer) -> Estimate:
    """Return `values = diag(exp(-beta s_l) (32 - bits))`, otherwise as `separability` (CSMPQ, post-training)."""
    return _priced(scorer, lambda scores: np.exp(-BETA * scores))


def tf_idf(pooled: FloatArray) -> float:
    """Return `mean over c of S(c) idf(c)`, the separability of one layer.

    With f the pooled answers, `tf(c, n) = f(c, n) / sum over c of f(c, n)`; S(c) is the mean of tf over the images n
    with `f(c, n) >= mean over n of f(c, n)`, m(c) their number, and `idf(c) = log(N / (1 + m(c)))`.

    Args:
        pooled: f, shape (channels, images), at least 0.
    """
    present = pooled >= pooled.mean(axis=1, keepdims=True)
    sums = pooled.sum(axis=0)
    # An image that no channel answers to has no frequencies.
    frequency = pooled / np.where(sums > 0, sums, 1.0)
    count = present.sum(axis=1)
    # Rounding can leave a constant channel below its own mean.
    strength = (frequency * present).sum(axis=1) / np.maximum(count, 1)
    return float((strength * np.log(pooled.shape[1] / (1 + count))).mean())


def _priced(scorer: Scorer, price: Callable[[FloatArray], FloatArray]) -> Estimate:
    images = scorer.images.slice(0, IMAGES)
    count = len(images)
    # Small batches, so that the memory does not grow with the images of one.
    starts = range(0, count, scorer.batch)
    work = {f"pooled-{start}": partial(_cell, scorer, start, min(count, start + scorer.batch)) for start in starts}
    found = Gathered(list(scorer.measure("pooled features", work).values()))
    pooled = [found.joined(site.name) for site in scorer.program[Sites].sites]
    without = [price(_scores(pooled, [k for k in range(count) if k != left_out])) for left_out in range(count)]
    errors = jackknife_error(np.stack(without, axis=-1)) if count > 1 else np.full(len(pooled), np.nan)
    return priced_bits(scorer, price(_scores(pooled, list(range(count)))), errors, found.evaluations)


def _scores(pooled: list[FloatArray], images: list[int]) -> FloatArray:
    return np.array([tf_idf(each[:, images]) if len(each) and images else 0.0 for each in pooled])


def _cell(scorer: Scorer, start: int, stop: int) -> Cell:
    images = scorer.images.slice(start, stop)
    nothing = torch.zeros(0, len(images), dtype=torch.float64)
    # The channels of a layer that is used several times lie side by side.
    features = layer_features(scorer, images, _pooled).items()
    made = {site: torch.cat([nothing, *each]).cpu().numpy() for site, each in features}
    return {**made, "evaluations": scorer.take_spent(len(images))}


def _pooled(answer: Tensor, channels: int) -> Tensor:
    """Return the mean of each channel's positive part over all positions, shape (channels, images)."""
    moved = answer.relu().movedim(channels, 1)
    return moved.flatten(2).mean(dim=2).T if moved.dim() > 2 else moved.T
