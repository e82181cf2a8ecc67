"""Losses of whole models: the sum over several outputs, and functions that a user gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fxquant.core.errors import CalibrationError, OptionError
from fxquant.core.facts import FUNCTION, function_name
from fxquant.core.run.losses import LOSSES, Generators, Loss, LossFunction

JOIN = "+"
"""Separates names in the text of an option: losses of several outputs, a chain of rounding algorithms."""


@dataclass(frozen=True)
class Part:
    """One output of a model as losses compare it.

    Args:
        loss: None where it is not compared.
        shape: of one image.
        axis: that holds classes, counted with the axis of images in front; 1 for losses without classes.
    """

    loss: Loss | None
    shape: tuple[int, ...]
    axis: int = 1

    @property
    def size(self) -> int:
        """Number of values of one image."""
        return prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """Return the output, classes on axis 1, from its values as a row per image."""
        value = flat.reshape(len(flat), *self.shape)
        return value.movedim(self.axis, 1) if self.shape else value

    def flat(self, value: Tensor) -> Tensor:
        """Return what `of` was given."""
        return (value.movedim(1, self.axis) if self.shape else value).reshape(len(value), self.size)


class JointLoss(Loss):
    """Sum of the losses of several outputs, which are flattened and joined, or of one whose classes are elsewhere.

    Args:
        parts: the outputs in order; one at least is compared.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = tuple(parts)
        used = [part.loss for part in self.parts if part.loss is not None]
        super().__init__(JOIN.join(loss.name for loss in used), " + ".join(dict.fromkeys(loss.unit for loss in used)))
        self.judged_unsure = all(loss.judged_unsure for loss in used)
        self.needs_labels = any(loss.needs_labels for loss in used)

    def __call__(self, reference: Tensor, output: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the sum of each image, float64."""
        return self._sum(lambda loss, a, b: loss(a, b, labels), reference, output)

    def embed(self, reference: Tensor, shift: Tensor) -> Tensor:
        """Return the embeddings of the outputs, joined."""
        pieces = self.pieces(reference, shift)
        return torch.cat([part.loss.embed(a, b) for part, a, b in pieces if part.loss is not None], dim=1)

    def sample(self, answer: Tensor, reference: Tensor, generators: Generators) -> Tensor:
        """Return the samples of the outputs, joined; drawn independently, they do not correlate."""
        return self._joined(answer, reference, lambda loss, a, b: loss.sample(a, b, generators))

    def sample_labels(self, answer: Tensor, generators: Generators) -> Tensor:
        """Return the samples of the outputs, joined."""
        return self._joined(answer, answer, lambda loss, a, _: loss.sample_labels(a, generators))

    def soften(self, reference: Tensor, answer: Tensor, temperature: float) -> Tensor:
        """Return the sum of the outputs' losses to train by."""
        return self._sum(lambda loss, a, b: loss.soften(a, b, temperature), reference, answer)

    def _sum(self, term: Callable[[Loss, Tensor, Tensor], Tensor], one: Tensor, other: Tensor) -> Tensor:
        terms = [term(part.loss, a, b) for part, a, b in self.pieces(one, other) if part.loss is not None]
        return torch.stack(terms).sum(dim=0)

    def _joined(self, one: Tensor, other: Tensor, made: Callable[[Loss, Tensor, Tensor], Tensor]) -> Tensor:
        pieces = self.pieces(one, other)
        rows = [part.flat(torch.zeros_like(a) if part.loss is None else made(part.loss, a, b)) for part, a, b in pieces]
        return torch.cat(rows, dim=1).reshape(one.shape)

    def pieces(self, one: Tensor, other: Tensor) -> list[tuple[Part, Tensor, Tensor]]:
        """Return each output with its values in two answers, shape (images, ...), classes along axis 1."""
        rows = [torch.split(x.reshape(len(x), -1), [part.size for part in self.parts], dim=1) for x in (one, other)]
        return [(part, part.of(a), part.of(b)) for part, a, b in zip(self.parts, *rows, strict=True)]


class FunctionLoss(Loss):
    """A function that a user gives.

    Args:
        function: (float output, quantized output, labels or None) -> loss of each image; of a model with several
            float outputs it is given tuples of them.
        shapes: of each output for one image; None for a single one, given as it is.
        shown: makes the model's outputs of the values that are compared; None where they are the outputs.
    """

    curved = False

    def __init__(
        self,
        function: LossFunction,
        shapes: Sequence[tuple[int, ...]] = (),
        shown: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
    ) -> None:
        super().__init__(function_name(function), "of the given function")
        self._function, self._shown = function, shown
        self.parts = JointLoss([Part(LOSSES["mse"], shape) for shape in shapes]) if len(shapes) > 1 else None

    def __call__(self, reference: Tensor, output: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss of each image, float64.

        Raises:
            CalibrationError: the function does not return one number for each image.
        """
        given = (self._given(reference), self._given(output))
        found = self._function(*given, labels)
        if not isinstance(found, Tensor) or found.shape != (len(reference),):
            said = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise CalibrationError(
                f"loss {self.name!r} must return a tensor with one number for each of {len(reference)} images, "
                f"shape ({len(reference)},), and returned {said}; take the mean over all axes but the first"
            )
        return found.double()

    def products(self, reference: Tensor, answer: Tensor, shifts: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """Return `f(s_i + s_j) - f(s_i) - f(s_j) + f(0)`: exact for squared losses, and the network does not run."""
        with torch.no_grad():
            none, alone = self(reference, answer, labels), [self(reference, answer + s, labels) for s in shifts]
            found = torch.zeros(len(answer), len(shifts), len(shifts), dtype=torch.float64)
            for i, j in itertools.combinations_with_replacement(range(len(shifts)), 2):
                both = self(reference, answer + shifts[i] + shifts[j], labels)
                found[:, i, j] = found[:, j, i] = (both - alone[i] - alone[j] + none).cpu()
        return found

    def _given(self, answer: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = [answer] if self.parts is None else [value for _, value, _ in self.parts.pieces(answer, answer)]
        made = values if self._shown is None else self._shown(values)
        return made[0] if len(made) == 1 else tuple(made)


def loss_of(given: str | Loss | LossFunction) -> Loss:
    """Return the loss of a name or a function, for one output with classes along axis 1.

    Raises:
        OptionError: no loss has this name, or it is the name of a function that a saved file could not hold.
    """
    if isinstance(given, Loss):
        return given
    if not isinstance(given, str):
        return FunctionLoss(given)
    if given.startswith(FUNCTION):
        raise OptionError(
            f"the loss was the {given}, which a file cannot hold; give it again: fxquant.load(folder, loss=...)"
        )
    return LOSSES[given]


def first_output(loss: Loss, answer: Tensor) -> Tensor:
    """Return the model's first float output, classes along axis 1, of an answer that a loss compares."""
    parts = loss.parts if isinstance(loss, FunctionLoss) else loss
    return parts.pieces(answer, answer)[0][1] if isinstance(parts, JointLoss) else answer
