"""Pick the finalist of least measured loss on held-out calibration images, and improve it by swaps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor
from torch.fx import GraphModule

from fxquant.core.errors import OptionError
from fxquant.core.facts import (
    BitAllocation,
    CostTables,
    Finalists,
    Settings,
    Surrogates,
    agrees,
    fits,
    limit_rows,
    tie_rows,
)
from fxquant.core.host import SILENT, Reporter
from fxquant.core.ir import Choice, Program, QuantizedEdges, Sites
from fxquant.core.run import LOSSES, CalibrationSet, model_outputs
from fxquant.passes.allocation import borders_of, modelled_plan, one_hot, swaps
from fxquant.passes.base import Pass
from fxquant.passes.simulation import simulate

REFINED = "refined"
"""Name of the improved plan among the finalists."""


def image_losses(module: GraphModule, images: CalibrationSet, reference: Tensor, loss: str, batch: int = 32) -> Tensor:
    """Return the loss of a simulated graph against the float answers, float64 of shape (images,)."""
    return LOSSES[loss](reference, model_outputs(module, images.inputs, batch), images.labels)


def measured_loss(module: GraphModule, images: CalibrationSet, reference: Tensor, loss: str, batch: int = 32) -> float:
    """Return the mean loss of a simulated graph against the float answers, over all images."""
    return float(image_losses(module, images, reference, loss, batch).mean())


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
        loss: name of the loss.
    """

    def __init__(self, program: Program, images: CalibrationSet, loss: str) -> None:
        self._program, self._images, self._loss = program, images, loss
        self._reference = model_outputs(program.module, images.inputs, 32)
        self._known: dict[frozenset[tuple[str, str]], Tensor] = {}

    def knows(self, choices: Mapping[str, Choice]) -> bool:
        """Whether these choices have been measured."""
        return _key(choices) in self._known

    def losses(self, plan: BitAllocation) -> Tensor:
        """Return the loss of each image, float64 of shape (images,)."""
        key = _key(plan.choices)
        if key not in self._known:
            module = simulate(self._program, plan).module
            self._known[key] = image_losses(module, self._images, self._reference, self._loss)
        return self._known[key]


def _key(choices: Mapping[str, Choice]) -> frozenset[tuple[str, str]]:
    return frozenset((site, choice.label) for site, choice in choices.items())


@dataclass(frozen=True)
class VerifyAndRefine(Pass):
    """Rewrite `BitAllocation` with the finalist of least measured loss, improved; ties go to the surrogates' own order.

    Improved means: of the plans that differ at one site or two and keep the limits, those that the surrogates rank
    highest are measured; one that is better beyond the noise replaces the plan, and the ranking starts again.
    What requantization between neighbours costs counts with the loss.

    Args:
        images: calibration images that were not used for scoring.
        loss: name of the loss.
        reporter: shows progress.
        moves: plans measured at most to improve the best finalist; 0 leaves it as it is.
        patience: measured plans in a row without improvement that end the search, at least 1.
        requantization_cost: of two neighbours with unlike activation widths, in the unit of the loss, >= 0.

    Raises:
        OptionError: moves or patience out of range.
    """

    images: CalibrationSet = field(repr=False)
    loss: str = "kl"
    reporter: Reporter = field(default=SILENT, repr=False)
    moves: int = 0
    patience: int = 8
    requantization_cost: float = 0.0
    reads = (Finalists, QuantizedEdges, Sites, Surrogates, CostTables, Settings)
    writes = (BitAllocation,)

    def __post_init__(self) -> None:
        if self.moves < 0 or self.patience < 1:
            raise OptionError(f"moves={self.moves} must be at least 0 and patience={self.patience} at least 1")

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with the measured plan."""
        plans = program[Finalists].plans
        meter = Meter(program, self.images, self.loss)
        losses: dict[str, float] = {}
        for name, plan in self.reporter.track(plans.items(), "verify plans", len(plans)):
            losses[name] = float(meter.losses(plan).mean())
        # A plan that overflows has loss NaN, which compares as neither better nor worse.
        totals = {name: losses[name] + plan.border_cost for name, plan in plans.items()}
        best = min(totals, key=lambda name: math.inf if math.isnan(totals[name]) else totals[name])
        plan = self._measured(plans[best], losses[best], losses)
        return program.with_facts(self._refined(program, plan, meter) if self.moves else plan), 0

    def _refined(self, program: Program, start: BitAllocation, meter: Meter) -> BitAllocation:
        """Return a plan that is measurably better, or `start`."""
        borders, plan = borders_of(program, self.requantization_cost), start
        matrices = program[Surrogates].matrices
        matrix = matrices.get(start.estimator.split(",")[0], next(iter(matrices.values())))
        trials, rejected = self._trials(program, plan), 0
        for _ in self.reporter.track(range(self.moves), "refine plan", self.moves):
            choices = next((found for found in trials if not meter.knows(found)), None)
            if choices is None:
                break
            modelled = modelled_plan(program, choices, matrix, borders, start.limits)
            trial = replace(modelled, estimator=f"{start.estimator}, {REFINED}", status="measured")
            if is_better(meter.losses(plan), meter.losses(trial), trial.border_cost - plan.border_cost):
                plan, rejected = trial, 0
                trials = self._trials(program, plan)
                continue
            rejected += 1
            if rejected == self.patience:
                break
        if plan is start:
            return start
        loss = float(meter.losses(plan).mean())
        return self._measured(plan, loss, {**start.finalists, REFINED: loss})

    def _measured(self, plan: BitAllocation, loss: float, finalists: dict[str, float]) -> BitAllocation:
        return replace(plan, measured_loss=loss, loss=self.loss, images=len(self.images), finalists=finalists)

    def _trials(self, program: Program, plan: BitAllocation) -> Iterator[dict[str, Choice]]:
        """Yield the choices of plans near this one that keep its limits, most promising first."""
        sites, tables, matrices = program[Sites], program[CostTables], list(program[Surrogates].matrices.values())
        (costs, bounds), (ties, sides) = limit_rows(plan.limits, tables, sites), tie_rows(sites)
        borders, picked = borders_of(program, self.requantization_cost), one_hot(sites.candidates, plan.choices)
        if picked.sum() != len(sites.sites):
            # A plan edited by hand may hold precisions that are no candidates.
            return
        near = swaps(
            [matrix.values + borders for matrix in matrices],
            matrices[0].groups,
            np.concatenate([costs, ties]),
            np.concatenate([bounds, sides]),
            picked,
        )
        for chosen in near:
            choices = {c.site: c.choice for c, taken in zip(sites.candidates, chosen, strict=True) if taken}
            # The rows allow the solver's tolerance; the budget does not.
            if fits(choices, plan.limits, tables) and agrees(sites.sites, choices):
                yield choices
