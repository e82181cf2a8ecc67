"""What share each owner has of the loss of a format: the gradient, integrated on the straight way to it.

A format rounds everything to the k-th narrowest choice of each owner at once. Aumann and Shapley's attribution of its
loss L to the changes d_i of weights and activations is

    phi_i = integral over t in 0..1 of <grad_i loss(W + t dW, x + t (Q(x) - x)), d_i>,    sum of phi = L.
"""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from fxquant.core.storage import Arrays
from fxquant.passes.sensitivity.backward import Tape
from fxquant.passes.sensitivity.columns import Column, Replacement, RoundedWeight
from fxquant.passes.sensitivity.cotangents import loss_gradient
from fxquant.passes.sensitivity.scorer import Batch, Scorer

POINTS = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)
"""Gauss-Legendre nodes on 0..1, of weight 1/2 each: exact for integrands up to the third power of t."""


def formats(scorer: Scorer) -> list[list[int]]:
    """Return, for k = 0, 1, ..., the k-th narrowest column of every owner, its widest where it has fewer."""
    ranked = [
        sorted(
            (k for k, column in enumerate(scorer.columns) if column.owner == owner),
            key=lambda k: scorer.columns[k].weight_bits or scorer.columns[k].activation_bits or 0,
        )
        for owner in dict.fromkeys(scorer.owners)
    ]
    return [[own[min(k, len(own) - 1)] for own in ranked] for k in range(max(map(len, ranked)))]


def walk(scorer: Scorer, batch: Batch, plans: list[list[int]]) -> Arrays:
    """Measure formats on one batch.

    Returns:
        `phi` of shape (formats, owners, images), `losses` of shape (formats, images), and `flat`, the losses of an
        answer that is 0 everywhere, shape (images,).
    """
    reference, loss, labels = scorer.base(batch).reference, scorer.loss, batch.images.labels
    phi, losses = [], []
    for plan in plans:
        parts = [scorer.columns[k].substitution for k in plan]
        whole = {name: replacement for each in parts for name, replacement in each.items()}
        steps = dict(zip(whole, _steps(scorer, batch, whole, reference).numpy(), strict=True))
        # A value that several sites round is one step of the way, of which each has an equal part.
        shared = Counter(name for each in parts for name in each)
        nothing = np.zeros(len(batch.images))
        phi.append(np.stack([sum((steps[name] / shared[name] for name in each), nothing) for each in parts]))
        with torch.no_grad():
            end, _ = scorer.replay.forward(batch.images.inputs, {**scorer.off, **whole})
        losses.append(loss(reference, end, labels).cpu().numpy())
    flat = loss(reference, torch.zeros_like(reference), labels).cpu().numpy()
    return {"phi": np.stack(phi), "losses": np.stack(losses), "flat": flat}


def _steps(scorer: Scorer, batch: Batch, whole: dict[str, Replacement], reference: Tensor) -> Tensor:
    """Return the attribution of every quantizer, float64 of shape (quantizers, images)."""
    steps = torch.zeros(len(whole), len(batch.images), dtype=torch.float64)
    walker = copy.copy(scorer)
    walker.columns = tuple(Column(name, {name: replacement}, None, None, None) for name, replacement in whole.items())
    for t in POINTS if whole else ():
        walker.in_context = {**scorer.off, **{name: _partway(replacement, t) for name, replacement in whole.items()}}
        tape = Tape(walker, batch)
        slope = loss_gradient(scorer, batch, tape.answer, reference)
        # From a point on the way, 1 - t of the step is left to go.
        found = tape.responses([tape.gradients(slope)])[0] / (1.0 - t)
        steps += found.cpu() / len(POINTS)
    return steps


def _partway(replacement: Replacement, t: float) -> Replacement:
    def partway(x: Tensor) -> Tensor:
        start = x.detach() if isinstance(replacement, RoundedWeight) else x
        return start + t * (replacement(start) - start)

    return partway
