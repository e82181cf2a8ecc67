"""Measured losses of plans, image by image, and when one plan is better than another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.core.facts import BitAllocation
from fxquant.core.ir import Choice, Program
from fxquant.core.run import CalibrationSet, Loss, loss_of, model_outputs
from fxquant.passes.simulation import simulate

FIRST_SHARE = 4
"""One image in this many is run first; a plan that is clearly worse on those is run on no other."""
FEWEST_FIRST = 8
"""Images that are enough to drop a plan."""


def image_losses(
    module: GraphModule, images: CalibrationSet, reference: Tensor, loss: str | Loss, only: Tensor | None = None
) -> Tensor:
    """Return the loss of a simulated graph against the float answers, float64 of shape (images,).

    Args:
        module: the simulated graph.
        images: to run.
        reference: float answers of those that are run.
        loss: the loss, or its name.
        only: positions of those to run; None for all.
    """
    labels = images.labels if images.labels is None or only is None else images.labels[only]
    return loss_of(loss)(reference, model_outputs(module, images.inputs, only=only), labels)


def measured_loss(module: GraphModule, images: CalibrationSet, reference: Tensor, loss: str | Loss) -> float:
    """Return the mean loss of a simulated graph against the float answers, over all images."""
    return float(image_losses(module, images, reference, loss).mean())


def is_better(now: Tensor, then: Tensor, surcharge: float = 0.0) -> bool:
    """Whether losses fall by more than the noise of these images: `mean(d) - surcharge > std(d) / sqrt(images)`.

    Args:
        now: losses of the plan at hand, shape (images,).
        then: losses of the other plan on the same images; d is `now - then`.
        surcharge: what the other plan costs more, in the unit of the loss.
    """
    fall = now - then
    if len(fall) < 2:
        # One image says nothing about its noise.
        return False
    return bool(fall.mean() - surcharge > fall.std(correction=1) / math.sqrt(len(fall)))


class Meter:
    """Measures plans of a program by simulation, each of them once.

    Args:
        program: calibrated.
        images: the images to measure on.
        loss: the loss, or its name.
    """

    def __init__(self, program: Program, images: CalibrationSet, loss: str | Loss) -> None:
        self._program = program
        self.images, self.loss = images, loss_of(loss)
        every = torch.arange(len(images))
        first, rest = (every[matches] for matches in (every % FIRST_SHARE == 0, every % FIRST_SHARE != 0))
        #: positions of the images that are run together, in the order of running
        self._parts = [first, rest] if len(first) >= FEWEST_FIRST else [every]
        self._references = [model_outputs(program.module, images.inputs, only=part) for part in self._parts]
        self._known: dict[frozenset[tuple[str, str]], Tensor] = {}
        #: the choices of every plan that was measured, or dropped after a share of the images -> its mean loss
        self._means: dict[frozenset[tuple[str, str]], tuple[Mapping[str, Choice], float]] = {}

    def knows(self, choices: Mapping[str, Choice]) -> bool:
        """Whether these choices have been measured, or dropped after a share of the images."""
        return _key(choices) in self._means

    def known(self) -> Iterator[tuple[Mapping[str, Choice], float, bool]]:
        """Yield choices, mean loss, and whether that is over all images, of every plan, in the order of measuring.

        The loss of a plan that was dropped is its rival's, and what it lost more than that on the first images.
        """
        for key, (choices, mean) in self._means.items():
            yield choices, mean, key in self._known

    def mean(self, plan: BitAllocation) -> float:
        """Return the mean loss of a plan as `known` has it.

        Raises:
            KeyError: the plan was not measured.
        """
        return self._means[_key(plan.choices)][1]

    def losses(self, plan: BitAllocation) -> Tensor:
        """Return the loss of each image, float64 of shape (images,)."""
        found = self.race(plan, None)
        assert found is not None
        return found

    def rough(self, plan: BitAllocation, known: BitAllocation) -> tuple[float, int]:
        """Return a plan's mean loss as the first images show it, and how many were run: for pictures, not to decide.

        The loss on the first images times the ratio of a known plan's loss on all of them to that on the first.

        Args:
            plan: to measure.
            known: a plan that is measured on all images.
        """
        if _key(plan.choices) in self._known or len(self._parts) == 1:
            return float(self.losses(plan).mean()), len(self.images)
        losses = self.losses(known)
        first = float(losses[self._parts[0]].mean())
        ratio = float(losses.mean()) / first if first > 0.0 else 1.0
        found = self._run(simulate(self._program, plan).module, 0)
        return float(found.mean()) * ratio, len(self._parts[0])

    def race(self, plan: BitAllocation, rival: Tensor | None, surcharge: float = 0.0) -> Tensor | None:
        """Return the loss of each image, or None once the first of them show that the plan is worse than a rival.

        Args:
            plan: to measure.
            rival: losses of the plan at hand; None for no race.
            surcharge: what the plan costs more than its rival, in the unit of the loss.
        """
        key = _key(plan.choices)
        if key not in self._known:
            module = simulate(self._program, plan).module
            found: list[Tensor] = []
            for part in range(len(self._parts)):
                if found and rival is not None and is_better(found[0], rival[self._parts[0]], -surcharge):
                    more = float((found[0] - rival[self._parts[0]]).mean())
                    self._means[key] = plan.choices, float(rival.mean()) + more
                    return None
                found.append(self._run(module, part))
            self._known[key] = torch.cat(found)[torch.cat(self._parts).argsort()] if len(found) > 1 else found[0]
            self._means[key] = plan.choices, float(self._known[key].mean())
        return self._known[key]

    def _run(self, module: GraphModule, part: int) -> Tensor:
        return image_losses(module, self.images, self._references[part], self.loss, self._parts[part])


def _key(choices: Mapping[str, Choice]) -> frozenset[tuple[str, str]]:
    return frozenset((site, choice.label) for site, choice in choices.items())
