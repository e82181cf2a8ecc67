"""Losses: the distance of a quantized answer from the float one, one value per image."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.core.errors import CalibrationError, OptionError
from fxquant.core.registry import Registry

LossFunction = Callable[..., Tensor]
"""(float output, quantized output, labels or None) -> loss of each image, shape (images,), 0 where both are equal."""

Generators = Sequence[torch.Generator]
"""One for each image, so that an image's sample does not depend on its batch."""


VALUES_ONLY = (
    "this estimator needs the curvature of the loss, and {loss!r} gives values only; use an estimator that measures, "
    "for example 'gram', 'diagonal' or 'pairs'"
)


class Loss(ABC):
    """Distance of answers, shape (images, ...), with what estimators need of its curvature.

    Args:
        name: as settings and files have it.
        unit: of its values.
    """

    curved = True
    """Whether `embed`, `sample` and `sample_labels` are known; else only values are."""
    judged_unsure = False
    """Whether it says more where the float network is unsure: it compares class probabilities without labels."""
    needs_labels = False

    def __init__(self, name: str, unit: str) -> None:
        self.name, self.unit = name, unit

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def __call__(self, reference: Tensor, output: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss of each image, float64 of shape (images,).

        Args:
            reference: answers of the float model.
            output: answers of the quantized one, of the same shape.
            labels: shape (images,), or None.
        """

    def embed(self, reference: Tensor, shift: Tensor) -> Tensor:
        """Return e with `loss(reference + shift) ~ |e|^2 / 2` per image to second order, so that inner products add up.

        Returns:
            float32 of shape (images, features).

        Raises:
            OptionError: nothing is known of the curvature.
        """
        del reference, shift
        raise OptionError(VALUES_ONLY.format(loss=self.name))

    def sample(self, answer: Tensor, reference: Tensor, generators: Generators) -> Tensor:
        """Return v per image with `E[v v']` equal to the loss's Hessian in the answer (Gauss-Newton), without labels.

        Returns:
            shape and type of `answer`.

        Raises:
            OptionError: nothing is known of the curvature.
        """
        del answer, reference, generators
        raise OptionError(VALUES_ONLY.format(loss=self.name))

    def sample_labels(self, answer: Tensor, generators: Generators) -> Tensor:
        """Return the gradient of `log p(y)`, y sampled from the answer; what `sample` gives where there are no classes.

        Returns:
            shape and type of `answer`; its second moment is that of `sample`.
        """
        return self.sample(answer, answer, generators)

    def soften(self, reference: Tensor, answer: Tensor, temperature: float) -> Tensor:
        """Return the mean loss of a batch to train by, shape (): of logits over a temperature where there are classes.

        Args:
            reference, answer: as in calling the loss.
            temperature: above 0.
        """
        del temperature
        return _relative(reference, answer)

    def certainty(self, answers: Tensor) -> float | None:
        """Return the mean probability of the likeliest class, 0..1; None where classes do not exclude each other.

        Args:
            answers: of the float model.
        """
        del answers
        return None

    def products(self, reference: Tensor, answer: Tensor, shifts: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """Return `s_i' H s_j` per image, H the Hessian at the answer: what two shifts add to each other.

        Args:
            reference: answers of the float model.
            answer: where the shifts start.
            shifts: n tensors of the shape of `answer`.
            labels: shape (images,), or None.

        Returns:
            shape (images, n, n).
        """
        del reference, labels
        embedded = torch.stack([self.embed(answer.float(), shift.float()) for shift in shifts]).transpose(0, 1)
        return torch.matmul(embedded, embedded.transpose(1, 2)).double()


class SoftmaxLoss(Loss):
    """`KL(softmax(reference) || softmax(output))` in nats, classes along axis 1, averaged over positions."""

    judged_unsure = True

    def __init__(self, name: str = "kl", unit: str = "KL nats") -> None:
        super().__init__(name, unit)

    def __call__(self, reference: Tensor, output: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss of each image, float64; zero at the float model."""
        del labels
        p, q = (torch.log_softmax(x.double(), dim=1) for x in (reference, output))
        each = (p.exp() * (p - q)).sum(dim=1)
        return each.flatten(1).mean(dim=1) if p.dim() > 2 else each

    def certainty(self, answers: Tensor) -> float | None:
        """Return the mean probability of the likeliest class, 0..1, over images and positions."""
        return float(answers.detach().float().softmax(dim=1).amax(dim=1).mean())

    def embed(self, reference: Tensor, shift: Tensor) -> Tensor:
        """Return `e = sqrt(p) (shift - p . shift)`: `e . e'` equals `shift' (diag p - p p') shift'`."""
        p = torch.softmax(reference, dim=1)
        centred = shift - (p * shift).sum(dim=1, keepdim=True)
        embedded: Tensor = (p.sqrt() * centred).flatten(1) / _positions(reference) ** 0.5
        return embedded

    def sample(self, answer: Tensor, reference: Tensor, generators: Generators) -> Tensor:
        """Return `v = sqrt(q) r - q (sqrt(q) . r)`, q the answer's softmax and r random signs.

        The one-hot of a label sampled from q, minus q, has the same second moment, but for a confident answer it is
        next to 0 except for the rare other label: far more images for the same error.
        """
        del reference
        q = torch.softmax(answer.double(), dim=1)
        root = q.sqrt() * _signs(answer, generators)
        centred: Tensor = root - q * root.sum(dim=1, keepdim=True)
        scaled: Tensor = centred / _positions(answer) ** 0.5
        return scaled.to(answer.dtype)

    def sample_labels(self, answer: Tensor, generators: Generators) -> Tensor:
        """Return `one-hot(y) - q` with y sampled at every position from the answer's softmax q."""
        q = torch.softmax(answer.double(), dim=1)
        spots = (1, *answer.shape[2:])
        uniform = torch.stack([torch.rand(spots, generator=g, dtype=torch.float64) for g in generators]).to(q.device)
        # Inverse of the distribution function; round-off in its last step must not leave the range.
        label = (q.cumsum(dim=1) < uniform).sum(dim=1, keepdim=True).clamp(max=answer.shape[1] - 1)
        # The loss is a mean over positions, each with its own label.
        drawn: Tensor = (torch.zeros_like(q).scatter_(1, label, 1.0) - q) / _positions(answer) ** 0.5
        return drawn.to(answer.dtype)

    def soften(self, reference: Tensor, answer: Tensor, temperature: float) -> Tensor:
        """Return `KL(softmax(reference / T) || softmax(answer / T))`, mean over all positions, without a factor T^2."""
        p, q = (torch.log_softmax(x.float() / temperature, dim=1) for x in (reference, answer))
        return (p.exp() * (p - q)).sum(dim=1).mean()


class LabelLoss(SoftmaxLoss):
    """`CE(output, label) - CE(reference, label)` in nats, the loss of CLADO's paper; it may be negative."""

    judged_unsure = False
    needs_labels = True

    def __init__(self) -> None:
        super().__init__("ce", "cross-entropy nats")

    def __call__(self, reference: Tensor, output: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss of each image, float64.

        Raises:
            CalibrationError: no labels were given, one is out of range, or the output is not (images, classes).
        """
        if labels is None:
            raise CalibrationError(
                "loss 'ce' needs labels; give calibration batches as (images, labels) or use loss 'kl'"
            )
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


class SigmoidLoss(Loss):
    """KL of independent classes, `sum_c KL(sigmoid(reference_c) || sigmoid(output_c))`, averaged over positions.

    For scores that go through a sigmoid, as those of most detectors; classes are along axis 1.
    """

    judged_unsure = True

    def __init__(self) -> None:
        super().__init__("bce", "KL nats of independent classes")

    def __call__(self, reference: Tensor, output: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss of each image, float64."""
        del labels
        a, b = (_rows(x.double()) for x in (reference, output))
        each = a.sigmoid() * (a - b) - F.softplus(a) + F.softplus(b)
        return each.clamp(min=0.0).sum(dim=1) / _positions(reference)

    def embed(self, reference: Tensor, shift: Tensor) -> Tensor:
        """Return `e = shift sqrt(p (1 - p))`, p the sigmoid."""
        return _rows(shift) * _rows(self._deviation(reference))

    def sample(self, answer: Tensor, reference: Tensor, generators: Generators) -> Tensor:
        """Return `v = r sqrt(p (1 - p))`, r random signs."""
        del reference
        return (_signs(answer, generators) * self._deviation(answer.double())).to(answer.dtype)

    def soften(self, reference: Tensor, answer: Tensor, temperature: float) -> Tensor:
        """Return the loss of scores over a temperature, mean over images."""
        return self(reference / temperature, answer / temperature).mean()

    @staticmethod
    def _deviation(answer: Tensor) -> Tensor:
        return (answer.sigmoid() * (-answer).sigmoid() / _positions(answer)).sqrt()


class SquaredLoss(Loss):
    """`mean((output - reference)^2) / mean(reference^2)` per image, for outputs that are no class scores."""

    def __init__(self) -> None:
        super().__init__("mse", "relative squared error")

    def __call__(self, reference: Tensor, output: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss of each image, float64."""
        del labels
        a, b = (x.double().reshape(len(x), -1) for x in (reference, output))
        return (b - a).square().mean(dim=1) / a.square().mean(dim=1).clamp(min=1e-12)

    def embed(self, reference: Tensor, shift: Tensor) -> Tensor:
        """Return `e = shift sqrt(2 / |reference|^2)`."""
        rows = reference.reshape(len(reference), -1)
        norm = rows.square().sum(dim=1, keepdim=True).clamp(min=1e-12)
        return shift.reshape(rows.shape) * torch.sqrt(2.0 / norm)

    def sample(self, answer: Tensor, reference: Tensor, generators: Generators) -> Tensor:
        """Return `v = r sqrt(2 / |reference|^2)`, r random signs."""
        norm = reference.double().reshape(len(reference), -1).square().sum(dim=1).clamp(min=1e-12)
        scaled: Tensor = _signs(answer, generators) * torch.sqrt(2.0 / norm).reshape(-1, *[1] * (answer.dim() - 1))
        return scaled.to(answer.dtype)


def _rows(value: Tensor) -> Tensor:
    return value.reshape(len(value), -1)


def _relative(reference: Tensor, answer: Tensor) -> Tensor:
    return (answer - reference).square().sum() / reference.square().sum().clamp(min=1e-12)


def _positions(answer: Tensor) -> float:
    """Return over how many positions losses with classes on axis 1 are averaged."""
    return float(math.prod(answer.shape[2:]))


def _signs(answer: Tensor, generators: Generators) -> Tensor:
    drawn = [torch.randint(0, 2, answer.shape[1:], generator=g, dtype=torch.float64) for g in generators]
    # Drawn on the CPU, so that a seed gives the same cotangents on every device.
    return (torch.stack(drawn) * 2 - 1).to(answer.device)


LOSSES: Registry[Loss] = Registry("loss")
"""Name -> loss."""
for _loss in (SoftmaxLoss(), LabelLoss(), SquaredLoss(), SigmoidLoss()):
    _ = LOSSES.register(_loss.name)(_loss)

UNITS = {name: loss.unit for name, loss in LOSSES.items()}
"""Name of a loss -> unit of its values."""
