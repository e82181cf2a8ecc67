"""`hawq`: mean trace of the Hessian times the power of rounding noise (HAWQ-v2 and -v3).

The trace is Hutchinson's: `E[v' H v] = Tr H` for random signs v. One Hessian-vector product serves all tensors at once,
because the signs of different tensors are independent. The Hessian is that of the scorer's loss: with KL and squared
error against the float network's own answer it is positive semidefinite and needs no labels; with cross-entropy it is
the papers', and its trace may be negative.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxquant.passes.sensitivity.cell_sweep import Cell
from fxquant.passes.sensitivity.cotangents import generator, image_generators, stream_of
from fxquant.passes.sensitivity.leaves import Leaves, activation_noise, weight_noise
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Batch, Scorer

PROBES = 16
"""Random sign vectors."""


@estimator("hawq", float_only=True, images=False)
def hawq(scorer: Scorer) -> Estimate:
    """Return `values = diag(sum over tensors of Tr(H) / (2 n) E|d|^2)`, about 34 passes per image.

    The sum takes in the weight (Dong et al., arXiv 1911.03852, equation 10; Yao et al., arXiv 2011.10680) and the
    values the column rounds, whose trace is that of one image (1911.03852, section 3.3). Standard errors are over
    probes.
    """
    found, images = scorer.by_batch("Hessian traces", "hawq", _cell), len(scorer.images)
    noise = np.hstack([weight_noise(scorer), found.total("noise") / images])
    samples = noise @ (found.total("traces") / images).T / 2
    return Estimate.diagonal(samples, found.evaluations, probes=PROBES)


def _cell(scorer: Scorer, batch: Batch) -> Cell:
    leaves = Leaves(scorer, batch.images)
    with torch.enable_grad():
        losses = scorer.loss(leaves.answer.detach(), leaves.answer, batch.images.labels)
        slope = leaves.gradients(losses.sum(), differentiable=True)
    traces = np.zeros((PROBES, len(slope)))
    for k in range(PROBES):
        signs = probe(scorer, batch, leaves, k)
        with torch.enable_grad():
            along = torch.stack([(g * v).sum(dtype=torch.float64) for g, v in zip(slope, signs, strict=True)]).sum()
            products = leaves.gradients(along, keep=True)
        traces[k] = [float((h * v).sum(dtype=torch.float64)) for h, v in zip(products, signs, strict=True)]
    # Backward passes count as one each, and through them twice.
    scorer.replay.spent += scorer.network_cost * (1 + 2 * PROBES)
    return {"traces": traces, "noise": activation_noise(scorer, leaves.environment, len(batch.images))}


def probe(scorer: Scorer, batch: Batch, leaves: Leaves, sample: int) -> list[Tensor]:
    """Return random signs for every leaf: one draw for weights, one per image for values, whatever the batch."""
    stream = stream_of(scorer, sample)
    own, common = image_generators(scorer, batch, stream, first=1), generator(stream, 0)
    signs = [_signs(weight.shape, common) for weight in leaves.weights.values()]
    for name, shift in leaves.shifts.items():
        axis = leaves.axes[name]
        if axis is None:
            signs.append(_signs(shift.shape, common))
            continue
        # An axis of images times something holds the images as its slow part.
        one = list(shift.shape)
        one[axis] //= len(own)
        signs.append(torch.cat([_signs(one, each) for each in own], dim=axis))
    return signs


def _signs(shape: torch.Size | list[int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator).float() * 2 - 1
