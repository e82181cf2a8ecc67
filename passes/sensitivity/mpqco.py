"""`mpqco`: half the mean square of each image's first-order change of its log-likelihood (MPQCO).

Responses are squared image by image: the square of their mean almost vanishes. The published method takes the
likelihood of the true class, as here with loss "ce"; otherwise the label is sampled from the model, which needs no
labels and estimates the Fisher matrix itself instead of the empirical one.
"""

from __future__ import annotations

from torch import Tensor

from fxquant.passes.sensitivity.backward import Tape
from fxquant.passes.sensitivity.cell_sweep import Cell
from fxquant.passes.sensitivity.cotangents import image_generators, loss_gradient
from fxquant.passes.sensitivity.registry import Estimate, estimator
from fxquant.passes.sensitivity.scorer import Batch, Scorer


@estimator("mpqco", float_only=True, curvature=True)
def mpqco(scorer: Scorer) -> Estimate:
    """Return `values = diag(E[s_i^2] / 2)`, s the response of log p(y), about 2 passes per image.

    Chen et al., arXiv 2110.06554, equation 8. With squared error, which knows no labels, random signs take their place.

    Raises:
        CalibrationError: loss "ce" without labels.
    """
    found = scorer.by_batch("backward pass of labels", "mpqco", _cell)
    return Estimate.diagonal(found.joined("responses") ** 2 / 2, found.evaluations)


def label_cotangents(scorer: Scorer, batch: Batch, answer: Tensor) -> Tensor:
    """Return the gradient of log p(y) in the answer of each image, y sampled from the answer, whatever the batch.

    Args:
        scorer: says which loss; for squared error random signs are scaled to its Hessian.
        batch: the batch.
        answer: the float network's, shape (images, ...).
    """
    return scorer.loss.sample_labels(answer, image_generators(scorer, batch, scorer.seed))


def _cell(scorer: Scorer, batch: Batch) -> Cell:
    tape = Tape(scorer, batch)
    if scorer.loss.needs_labels:
        cotangent = loss_gradient(scorer, batch, tape.answer, tape.reference)
    else:
        cotangent = label_cotangents(scorer, batch, tape.reference)
    return {"responses": tape.responses([tape.gradients(cotangent)])[0].cpu().numpy()}
