"""Accept or reject what one unit learned, on held-out images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.core.run import CalibrationSet, Loss, Span
from fxquant.passes.rounding.acceptance import rejection
from fxquant.passes.rounding.learned.cut import Cut
from fxquant.passes.rounding.learned.sources import RUN, Source
from fxquant.passes.rounding.learned.tune import channel_sums

HARM = 1.5
"""A unit is left as it was where the loss rises to this many times what it was, and its outputs go farther away.

At few bits the loss behind a float suffix says little about early units: a first layer tuned with dropped activations
raises it, and later units gain from that layer all the same. ResNet-20 at W2A2 (`qdrop`, 200 steps) has 73.1 % with all
units, and had 56.0 % where each had to lower the loss.
"""


@dataclass(frozen=True)
class Judged:
    """How a unit does on held-out images.

    Args:
        loss: of the network quantized up to the unit; None where the answer does not depend on the unit.
        error: squared error of the unit's outputs, summed over channels; None where they are the network's answer,
            which the loss compares.
    """

    loss: float | None = None
    error: float | None = None

    def rejection(self, before: Judged, loss: str | Loss) -> str:
        """Return why a unit is left as it was, "" where what it learned stays.

        It stays where its error falls, or its loss, or its loss rises by less than `HARM`: what is behind the unit is
        still float, and the chain as a whole is judged again at the end.
        """
        nearer = before.error is not None and not rejection(before.error, self.error, loss)
        allowed = None if before.loss is None else HARM * before.loss
        if nearer or not rejection(allowed, self.loss, loss):
            return ""
        return f"held-out {loss} rises too far: {before.loss:.4g} before, {self.loss:.4g} after"


@dataclass(frozen=True)
class UnitVerdict:
    """Measures units, one after the other.

    Args:
        quantized: values over the held-out images that cross the cut before the unit, of the quantized network.
        floats: the same of the float network.
        images: the held-out images.
        loss: compares answers.
        answer: name of the network's answer.
        reference: answers of the float network.
    """

    quantized: Source
    floats: Source
    images: CalibrationSet
    loss: Loss
    answer: str
    reference: Tensor

    def advance(self, cut: Cut, decided: Span, needed: Iterable[str]) -> None:
        """Move on to the next unit.

        Args:
            cut: around this one.
            decided: the unit as decided.
            needed: names of the values that later units read.
        """
        kept = tuple(needed)
        self.quantized.advance(decided, kept)
        self.floats.advance(cut.floats, kept)

    def judged(self, cut: Cut, span: Span) -> Judged:
        """Return how the unit that the cut is around does, quantized as in `span`."""
        answers, unit, count = cut.computes(self.answer), cut.unit, len(self.images)
        names = {*span.inputs, *(cut.suffix.inputs if cut.suffix is not None else ())} - set(span.outputs)
        losses, error = list[Tensor](), 0.0
        with torch.no_grad():
            for start in range(0, count, RUN):
                index = torch.arange(start, min(start + RUN, count))
                values = self.quantized.take(names, index)
                values |= span(values)
                targets = cut.floats(self.floats.take(cut.floats.inputs, index))
                pieces = (channel_sums(values[name] - targets[name]) for name in unit.outputs)
                error += len(index) / count * float(sum(pieces, torch.zeros(())))
                if answers:
                    answer = {**values, **({} if cut.suffix is None else cut.suffix(values))}[self.answer]
                    labels = self.images.slice(start, start + RUN).labels
                    losses.append(self.loss(self.reference[start : start + RUN], answer, labels))
        loss = float(torch.cat(losses).mean()) if answers else None
        return Judged(loss, None if self.answer in unit.outputs else error)
