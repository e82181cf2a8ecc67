"""`path`: attribution along the way to the fully quantized network, in a model of the loss that saturates.

Losses of single substitutions do not say what a plan costs that rounds everything: the loss has a ceiling, and single
losses at low widths add up to more than it. Hill (arXiv 2607.12266) models the loss of a set of substitutions as
coverage, `L = c (1 - product of (1 - a_i))`, so that `u = -log(1 - a)` adds up. Here a format rounds everything to the
k-th narrowest choice of each owner at once. Its loss gives the sum of its u, and Aumann and Shapley's integral of the
gradient along the straight way there says what share each owner has:

    phi_i = integral over t in 0..1 of <grad_i loss(W + t dW, x + t (Q(x) - x)), d_i>,    sum of phi = L.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxquant.core.run import LOSSES
from fxquant.passes.sensitivity.backward import Tape
from fxquant.passes.sensitivity.cell_sweep import Cell
from fxquant.passes.sensitivity.columns import Column, Constant, Replacement
from fxquant.passes.sensitivity.cotangents import loss_gradient
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Part, Scorer

POINTS = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)
"""Gauss-Legendre nodes on 0..1, of weight 1/2 each: exact for integrands up to the third power of t."""

HEADROOM = 1.05
"""The ceiling lies this much above the largest loss seen, so that no loss lies on it."""


@estimator("path", float_only=True, unit="coverage (-log)")
def path(scorer: Scorer) -> Estimate:
    """Return `values = diag(u)`, `u_i = U phi_i+ / sum phi+` with `U = -log(1 - L / c)`, 6 passes per format and image.

    The ceiling c is 1.05 times the largest mean loss of the formats and of an answer that is 0 everywhere (uniform
    scores). Standard errors are the jackknife's over images, c held fixed. A loss that is below 0 (cross-entropy)
    counts as 0. Notes hold the ceiling and the largest `|sum phi - L| / c`, the error of the quadrature.
    """
    plans = formats(scorer)
    work = {
        f"path-{part.index}-{k}": partial(_cell, scorer, part, plan)
        for part in scorer.parts
        for k, plan in enumerate(plans)
    }
    cells = scorer.measure("walk to the quantized network", work)
    gathered = {
        name: [
            np.concatenate([cells[f"path-{part.index}-{k}"][name] for part in scorer.parts], axis=-1)
            for k in range(len(plans))
        ]
        for name in ("phi", "losses", "flat")
    }
    worst = max(float(each.mean()) for each in (*gathered["losses"], *gathered["flat"]))
    ceiling = HEADROOM * max(worst, float(np.finfo(np.float32).tiny))
    values, stderr = np.zeros(len(scorer.columns)), np.zeros(len(scorer.columns))
    home: set[int] = set()
    gap = 0.0
    for plan, phi, losses in zip(plans, gathered["phi"], gathered["losses"], strict=True):
        # An owner with few choices stays at its widest in later formats; its share is that of the first.
        own = [place for place, column in enumerate(plan) if column not in home]
        chosen = [plan[place] for place in own]
        home.update(chosen)
        values[chosen] = attribution(phi.mean(axis=1), losses.mean(), ceiling)[own]
        stderr[chosen] = jackknife(phi, losses, ceiling)[own]
        gap = max(gap, abs(float(phi.sum(axis=0).mean() - losses.mean())) / ceiling)
    evaluations = float(sum(float(cell["evaluations"]) for cell in cells.values()))
    notes = {"ceiling": ceiling, "quadrature_error": gap}
    return Estimate(np.diag(values), np.diag(stderr), evaluations, notes)


def formats(scorer: Scorer) -> list[list[int]]:
    """Return, for k = 0, 1, ..., the k-th narrowest column of every owner, its widest where it has fewer."""
    ranked = [
        sorted((k for k, column in enumerate(scorer.columns) if column.owner == owner), key=partial(_width, scorer))
        for owner in dict.fromkeys(scorer.owners)
    ]
    return [[own[min(k, len(own) - 1)] for own in ranked] for k in range(max(map(len, ranked)))]


def attribution(phi: NDArray[np.float64], loss: NDArray[np.float64], ceiling: float) -> NDArray[np.float64]:
    """Return `u_i = -log(1 - loss / ceiling) phi_i+ / sum phi+`; 0 everywhere if no attribution is above 0.

    Args:
        phi: attributions, shape (owners, ...).
        loss: loss of the whole format, shape (...), below the ceiling.
        ceiling: largest loss there can be.
    """
    positive = np.maximum(phi, 0.0)
    total = positive.sum(axis=0)
    # Left out of the mean, an image may lift the others' loss to the ceiling and above.
    covered = np.clip(loss / ceiling, 0.0, 1.0 - 1e-9)
    share = np.divide(positive, total, out=np.zeros_like(positive), where=np.broadcast_to(total > 0, positive.shape))
    return np.asarray(-np.log1p(-covered) * share, dtype=np.float64)


def jackknife(phi: NDArray[np.float64], losses: NDArray[np.float64], ceiling: float) -> NDArray[np.float64]:
    """Return the jackknife standard error over images of `attribution`, NaN for fewer than two images."""
    images = losses.shape[-1]
    if images < 2:
        return np.full(len(phi), np.nan)
    others = (phi.sum(axis=1, keepdims=True) - phi) / (images - 1)
    left_out = attribution(others, (losses.sum() - losses) / (images - 1), ceiling)
    return np.asarray(np.sqrt((images - 1) * left_out.var(axis=1)), dtype=np.float64)


def _width(scorer: Scorer, column: int) -> int:
    bits = scorer.columns[column].weight_bits or scorer.columns[column].activation_bits
    assert bits is not None
    return bits


def _cell(scorer: Scorer, part: Part, plan: list[int]) -> Cell:
    """Measure one format on one batch: attributions of shape (owners, images), and losses of shape (images,)."""
    parts = [scorer.columns[k].substitution for k in plan]
    whole = {name: replacement for each in parts for name, replacement in each.items()}
    # A value that several sites round is one step of the way, of which each has an equal part.
    shared = Counter(name for each in parts for name in each)
    reference = scorer.base(part).reference
    steps = np.zeros((len(whole), len(part.images)))
    walker = copy.copy(scorer)
    walker.columns = tuple(Column(name, {name: replacement}, None, None, None) for name, replacement in whole.items())
    for t in POINTS if whole else ():
        walker.standing = {**scorer.off, **{name: _partway(replacement, t) for name, replacement in whole.items()}}
        tape = Tape(walker, part)
        slope = loss_gradient(scorer, part, tape.answer, reference)
        # From a point on the way, 1 - t of the step is left to go.
        found = tape.responses([tape.gradients(slope)])[0] / (1.0 - t)
        steps += found.cpu().numpy() / len(POINTS)
    index = {name: k for k, name in enumerate(whole)}
    phi = np.stack([sum((steps[index[n]] / shared[n] for n in each), np.zeros(len(part.images))) for each in parts])
    with torch.no_grad():
        end, _ = scorer.replay.forward(part.images.inputs, {**scorer.off, **whole})
    loss = LOSSES[scorer.loss]
    return {
        "phi": phi,
        "losses": loss(reference, end, part.images.labels).cpu().numpy(),
        "flat": loss(reference, torch.zeros_like(reference), part.images.labels).cpu().numpy(),
        "evaluations": scorer.take_spent(len(part.images)),
    }


def _partway(replacement: Replacement, t: float) -> Replacement:
    def partway(x: Tensor) -> Tensor:
        start = x.detach() if isinstance(replacement, Constant) else x
        return start + t * (replacement(start) - start)

    return partway
