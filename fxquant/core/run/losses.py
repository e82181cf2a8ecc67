"""Losses: the distance of a quantized answer from the float one, one value per image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxquant.core.errors import CalibrationError
from fxquant.core.registry import Registry

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(float output, quantized output, labels or None) -> float64 of shape (images,)."""

LOSSES: Registry[Loss] = Registry("loss")

UNITS = {"kl": "KL nats", "ce": "cross-entropy nats", "mse": "relative squared error"}


@LOSSES.register("kl")
def kl(reference: Tensor, output: Tensor, labels: Tensor | None) -> Tensor:
    """Return `KL(softmax(reference) || softmax(output))` in nats, averaged over positions; zero at the float model.

    Args:
        reference: float logits, shape (images, classes) or (images, classes, ...).
        output: quantized logits of the same shape.
        labels: not used.
    """
    del labels
    p, q = (torch.log_softmax(x.double(), dim=1) for x in (reference, output))
    return (p.exp() * (p - q)).sum(dim=1).flatten(1).mean(dim=1) if p.dim() > 2 else (p.exp() * (p - q)).sum(dim=1)


@LOSSES.register("ce")
def cross_entropy(reference: Tensor, output: Tensor, labels: Tensor | None) -> Tensor:
    """Return `CE(output, label) - CE(reference, label)` in nats, the loss of CLADO's paper; it may be negative.

    Raises:
        CalibrationError: no labels were given, one is out of range, or the output is not (images, classes).
    """
    if labels is None:
        raise CalibrationError("loss 'ce' needs labels; give calibration batches as (images, labels) or use loss 'kl'")
    if reference.dim() != 2:
        raise CalibrationError(
            f"loss 'ce' needs outputs (images, classes), not {tuple(reference.shape)}; use loss 'kl'"
        )
    low, high, classes = int(labels.min()), int(labels.max()), reference.shape[1]
    if low < 0 or high >= classes:
        raise CalibrationError(f"labels lie in {low}..{high}, the model knows classes 0..{classes - 1}")
    gather = labels.reshape(-1, 1).long()
    p, q = (torch.log_softmax(x.double(), dim=1).gather(1, gather).squeeze(1) for x in (reference, output))
    return p - q


@LOSSES.register("mse")
def relative_mse(reference: Tensor, output: Tensor, labels: Tensor | None) -> Tensor:
    """Return `mean((output - reference)^2) / mean(reference^2)` per image, for outputs that are no class scores."""
    del labels
    a, b = (x.double().reshape(len(x), -1) for x in (reference, output))
    return (b - a).square().mean(dim=1) / a.square().mean(dim=1).clamp(min=1e-12)


def default_loss(output: Tensor) -> str:
    """Return the loss that fits an output: "kl" for (images, classes >= 2) scores, else "mse"."""
    return "kl" if output.dim() == 2 and output.shape[1] >= 2 else "mse"


def embed_shift(loss: str, reference: Tensor, shift: Tensor) -> Tensor:
    """Return e with `loss(reference + shift) ~ |e|^2 / 2` per image to second order, so that inner products add up.

    For KL and cross-entropy `e = sqrt(p) (shift - p . shift)`, the Gauss-Newton factor of softmax (`e . e'` equals
    `shift' (diag p - p p') shift'`); for relative squared error `e = shift sqrt(2 / |reference|^2)`.

    Args:
        loss: name of the loss.
        reference: float output, shape (images, ...), classes along axis 1 for KL and cross-entropy.
        shift: quantized minus float output, of the same shape.

    Returns:
        float32 of shape (images, features).
    """
    if loss == "mse":
        rows = reference.reshape(len(reference), -1)
        norm = rows.square().sum(dim=1, keepdim=True).clamp(min=1e-12)
        return shift.reshape(rows.shape) * torch.sqrt(2.0 / norm)
    p = torch.softmax(reference, dim=1)
    positions = reference[0, 0].numel()
    centred = shift - (p * shift).sum(dim=1, keepdim=True)
    embedded: Tensor = (p.sqrt() * centred).flatten(1) / float(positions) ** 0.5
    return embedded


def sample_cotangent(loss: str, answer: Tensor, reference: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return v per image with `E[v v']` equal to the loss's Hessian in the answer (Gauss-Newton), without labels.

    KL and cross-entropy: `v = sqrt(q) r - q (sqrt(q) . r)` with q the answer's softmax and r random signs, over the
    square root of the number of positions. The one-hot of a label sampled from q, minus q, has the same second moment,
    but for a confident answer it is next to 0 except for the rare other label: far more images for the same error.
    Relative squared error: `v = r sqrt(2 / |reference|^2)`.

    Args:
        loss: name of the loss.
        answer: network output, shape (images, ...), classes along axis 1 for KL and cross-entropy.
        reference: float output of the same shape.
        generators: one for each image, so that an image's sample does not depend on its batch.

    Returns:
        shape and type of `answer`.
    """
    drawn = [torch.randint(0, 2, answer.shape[1:], generator=g, dtype=torch.float64) for g in generators]
    # Drawn on the CPU, so that a seed gives the same cotangents on every device.
    signs = (torch.stack(drawn) * 2 - 1).to(answer.device)
    if loss == "mse":
        norm = reference.double().reshape(len(reference), -1).square().sum(dim=1).clamp(min=1e-12)
        scaled: Tensor = signs * torch.sqrt(2.0 / norm).reshape(-1, *[1] * (answer.dim() - 1))
        return scaled.to(answer.dtype)
    q = torch.softmax(answer.double(), dim=1)
    root = q.sqrt() * signs
    centred: Tensor = root - q * root.sum(dim=1, keepdim=True)
    return (centred / math.sqrt(answer[0, 0].numel())).to(answer.dtype)


def sample_label_cotangent(answer: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return `one-hot(y) - q` with y sampled from the answer's softmax q: minus the gradient of `-log q(y)`.

    Args:
        answer: logits, shape (images, classes, ...).
        generators: one for each image.

    Returns:
        shape and type of `answer`; second moment `diag q - q q'` at every position.
    """
    q = torch.softmax(answer.double(), dim=1)
    spots = (1, *answer.shape[2:])
    uniform = torch.stack([torch.rand(spots, generator=g, dtype=torch.float64) for g in generators]).to(q.device)
    # Inverse of the distribution function; round-off in its last step must not leave the range.
    label = (q.cumsum(dim=1) < uniform).sum(dim=1, keepdim=True).clamp(max=answer.shape[1] - 1)
    return (torch.zeros_like(q).scatter_(1, label, 1.0) - q).to(answer.dtype)
