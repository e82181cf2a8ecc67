"""`fisher`: every single and pair term from one label-free forward and backward pass.

With v a random cotangent whose `E[v v']` is the loss's Hessian in the answer (for KL `diag p - p p'`, the second moment
of the gradient for labels sampled from the model), the response `s(i) = v . J delta_i` of each image gives

    values[i, i] = E[grad . J delta_i] + E[s(i)^2] / 2,    values[i, j] = E[s(i) s(j)] / 2,

the Gauss-Newton model of the loss. It is positive semidefinite by construction, up to the first-order term, which is 0
around the float network. With the most likely class instead of a sample the matrix is about half as large; with the
square of the mean gradient it almost vanishes.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fxquant.passes.sensitivity.backward import Tape
from fxquant.passes.sensitivity.cell_sweep import Cell
from fxquant.passes.sensitivity.cotangents import image_generators, loss_gradient, stream_of
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Batch, Scorer, standard_error

SAMPLES = 1
"""Cotangents drawn for each image, one backward pass each."""


@estimator("fisher", has_pairs=True, curvature=True)
def fisher(scorer: Scorer) -> Estimate:
    """Return the Gauss-Newton matrix of sampled responses, about 2 passes per image and one op run per choice."""
    found = scorer.by_batch("backward pass", "fisher", _cell)
    responses = found.joined("responses")
    products = np.einsum("kin,kjn->ijn", responses, responses) / (2 * len(responses))
    size = len(scorer.columns)
    products[np.arange(size), np.arange(size)] += found.joined("first")
    values = np.where(scorer.between | np.eye(size, dtype=bool), products.mean(axis=2), 0.0)
    return Estimate(values, standard_error(products), found.evaluations)


def cotangents(scorer: Scorer, batch: Batch, answer: Tensor, reference: Tensor, sample: int) -> Tensor:
    """Return one sampled cotangent for each image of a batch, the same whatever the size of batches."""
    generators = image_generators(scorer, batch, stream_of(scorer, sample))
    return scorer.loss.sample(answer, reference, generators)


def _cell(scorer: Scorer, batch: Batch) -> Cell:
    tape = Tape(scorer, batch)
    answer = tape.answer.detach()
    drawn = [cotangents(scorer, batch, answer, tape.reference, sample) for sample in range(SAMPLES)]
    slope = loss_gradient(scorer, batch, answer, tape.reference)
    # Around the float network the slope is 0 up to round-off: no backward pass needed.
    sloped = bool(slope.abs().max() > 1e-6 * drawn[0].abs().max())
    gradients = [tape.gradients(each) for each in ([*drawn, slope] if sloped else drawn)]
    found = tape.responses(gradients).cpu().numpy()
    first = found[SAMPLES] if sloped else np.zeros(found.shape[1:])
    return {"responses": found[:SAMPLES], "first": first}
