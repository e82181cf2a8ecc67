"""Pick the finalist of least measured loss, and improve it by measured swaps that a corrected model proposes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from fxquant.core.errors import OptionError
from fxquant.core.facts import (
    BitAllocation,
    CostTables,
    Finalists,
    SensitivityMatrix,
    Settings,
    Surrogates,
    agrees,
    fits,
    limit_rows,
    tie_rows,
)
from fxquant.core.host import SILENT, Reporter
from fxquant.core.ir import Choice, Program, QuantizedEdges, Sites
from fxquant.passes.allocation import LossModel, borders_of, descent, modelled_plan, one_hot, swaps
from fxquant.passes.base import Pass
from fxquant.passes.meter import Meter, is_better

REFINED = "refined"
"""Name of the improved plan among the finalists."""
DEPTH = 3
"""Swaps that one proposal makes at most, one after the other, each of one site or two."""


@dataclass(frozen=True)
class VerifyAndRefine(Pass):
    """Rewrite `BitAllocation` with the finalist of least measured loss, improved; the first finalist wins ties.

    Improved means: what was measured so far corrects the model of the loss (`LossModel`); a draw from it proposes a
    plan a few swaps away that keeps the limits; one that is better beyond the noise replaces the plan at hand. A
    proposal is run on all images only if it is not clearly worse on the first of them. What requantization between
    neighbours costs counts with the loss.

    Args:
        meter: of the program; what it measured for other limits is known here.
        reporter: shows progress.
        moves: plans measured at most to improve the best finalist; 0 leaves it as it is.
        patience: measured plans in a row without improvement that end the search, at least 1.
        requantization_cost: of two neighbours with unlike activation widths, in the unit of the loss, >= 0.

    Raises:
        OptionError: moves or patience out of range.
    """

    meter: Meter = field(repr=False)
    reporter: Reporter = field(default=SILENT, repr=False)
    moves: int = 0
    patience: int = 24
    requantization_cost: float = 0.0
    reads = (Finalists, QuantizedEdges, Sites, Surrogates, SensitivityMatrix, CostTables, Settings)
    writes = (BitAllocation,)

    def __post_init__(self) -> None:
        if self.moves < 0 or self.patience < 1:
            raise OptionError(f"moves={self.moves} must be at least 0 and patience={self.patience} at least 1")

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with the measured plan."""
        plans = program[Finalists].plans
        losses: dict[str, float] = {}
        totals: dict[str, float] = {}
        best, least = next(iter(plans)), math.inf
        for name, plan in self.reporter.track(plans.items(), "verify plans", len(plans)):
            # A plan that is clearly worse than the best so far is run on the first images alone.
            leader = None if least == math.inf else self.meter.losses(plans[best])
            self.meter.race(plan, leader, plan.border_cost - plans[best].border_cost)
            losses[name] = self.meter.mean(plan)
            totals[name] = losses[name] + plan.border_cost
            # A plan that overflows has loss NaN, which compares as neither better nor worse.
            if totals[name] < least:
                best, least = name, totals[name]
        plan = self._measured(plans[best], losses[best], losses)
        return program.with_facts(self._refined(program, plan) if self.moves else plan), 0

    def _refined(self, program: Program, start: BitAllocation) -> BitAllocation:
        """Return a plan that is measurably better, or `start`."""
        meter = self.meter
        borders, plan, rejected = borders_of(program, self.requantization_cost), start, 0
        matrices, candidates = program[Surrogates].matrices, program[Sites].candidates
        matrix = matrices.get(start.estimator.split(",")[0], next(iter(matrices.values())))
        if one_hot(candidates, start.choices).sum() != len(program[Sites].sites):
            # A plan edited by hand may hold precisions that are no candidates.
            return start
        model = LossModel(next(iter(matrices.values())).values, program[Settings].seed)
        for choices, loss, _ in meter.known():
            model.add(one_hot(candidates, choices), loss)

        def near(choices: Mapping[str, Choice]) -> BitAllocation:
            found = modelled_plan(program, dict(choices), matrix, borders, start.limits)
            return replace(found, estimator=f"{start.estimator}, {REFINED}", status="measured")

        # Another limit may have led to a plan that keeps this one and is better.
        least = float(meter.losses(start).mean()) + start.border_cost
        for choices in self._kept(program, start.limits, least):
            other = near(choices)
            total = float(meter.losses(other).mean()) + other.border_cost
            if total < least:
                plan, least = other, total
        for _ in self.reporter.track(range(self.moves), "refine plan", self.moves):
            trials = self._trials(program, plan, model.draw() + borders)
            proposed = next((found for found in trials if not meter.knows(found)), None)
            if proposed is None:
                break
            trial = near(proposed)
            now, surcharge = meter.losses(plan), trial.border_cost - plan.border_cost
            then = meter.race(trial, now, surcharge)
            model.add(one_hot(candidates, proposed), meter.mean(trial))
            if then is not None and is_better(now, then, surcharge):
                plan, rejected = trial, 0
                continue
            rejected += 1
            if rejected == self.patience:
                break
        if plan is start:
            return start
        loss = float(meter.losses(plan).mean())
        return self._measured(plan, loss, {**start.finalists, REFINED: loss})

    def _kept(self, program: Program, limits: Mapping[str, float], most: float) -> list[Mapping[str, Choice]]:
        """Return the choices that were measured on all images, lose less than `most`, and keep the limits."""
        sites, tables = program[Sites].sites, program[CostTables]
        return [
            choices
            for choices, loss, whole in self.meter.known()
            if whole and loss < most and fits(choices, limits, tables) and agrees(sites, choices)
        ]

    def _measured(self, plan: BitAllocation, loss: float, finalists: dict[str, float]) -> BitAllocation:
        return replace(
            plan, measured_loss=loss, loss=self.meter.loss.name, images=len(self.meter.images), finalists=finalists
        )

    def _trials(
        self, program: Program, plan: BitAllocation, values: NDArray[np.float64]
    ) -> Iterator[dict[str, Choice]]:
        """Yield the choices of plans near this one that keep its limits: several swaps away, then one, best first."""
        sites, tables = program[Sites], program[CostTables]
        (costs, bounds), (ties, sides) = limit_rows(plan.limits, tables, sites), tie_rows(sites)
        rows, sums = np.concatenate([costs, ties]), np.concatenate([bounds, sides])
        groups, picked = program[SensitivityMatrix].groups, one_hot(sites.candidates, plan.choices)
        for chosen in chain(
            descent(values, groups, rows, sums, picked, DEPTH), swaps([values], groups, rows, sums, picked)
        ):
            choices = {c.site: c.choice for c, taken in zip(sites.candidates, chosen, strict=True) if taken}
            # The rows allow the solver's tolerance; the budget does not.
            if fits(choices, plan.limits, tables) and agrees(sites.sites, choices):
                yield choices
