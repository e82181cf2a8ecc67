"""Cotangents that backward passes start from: the loss's gradient, and random draws that do not depend on the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.core.errors import OptionError
from fxquant.passes.sensitivity.scorer import Batch, Scorer

_APART = 1_000_003
"""Distance between the seeds of two streams, above any number of images."""


def loss_gradient(scorer: Scorer, batch: Batch, answer: Tensor, reference: Tensor) -> Tensor:
    """Return the gradient of each image's loss in the answer; 0 where the answer is the reference.

    Args:
        scorer: has the loss.
        batch: the batch, for its labels.
        answer: where to differentiate, shape (images, ...); it is detached.
        reference: answer of the float network, the same shape.

    Raises:
        OptionError: the loss cannot be differentiated.
    """
    point = answer.detach().requires_grad_()
    with torch.enable_grad():
        losses = scorer.loss(reference, point, batch.images.labels)
        if not losses.requires_grad:
            raise OptionError(
                f"this estimator needs the gradient of the loss, and torch cannot differentiate {scorer.loss.name!r}; "
                "use an estimator that measures, for example 'gram', 'diagonal' or 'pairs'"
            )
        (gradient,) = torch.autograd.grad(losses.sum(), point)
    return gradient


def stream_of(scorer: Scorer, sample: int) -> int:
    """Return the stream of the n-th draw of a scorer."""
    return scorer.seed * 8191 + sample


def generator(stream: int, number: int) -> torch.Generator:
    """Return generator `number` of a stream."""
    return torch.Generator().manual_seed(stream * _APART + number)


def image_generators(scorer: Scorer, batch: Batch, stream: int, first: int = 0) -> list[torch.Generator]:
    """Return one generator for each image of a batch, the same whatever the size of batches.

    Args:
        scorer: has the batch size.
        batch: the batch.
        stream: which draw.
        first: number of the first image's generator; smaller numbers are for the caller.
    """
    start = batch.index * scorer.batch + first
    return [generator(stream, number) for number in range(start, start + len(batch.images))]
