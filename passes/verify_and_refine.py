"""Let the measured loss decide: every finalist runs on held-out calibration images, the best is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.core.allocation import BitAllocation, Finalists
from fxquant.core.data import CalibrationSet
from fxquant.core.losses import LOSSES
from fxquant.core.oracle import model_outputs
from fxquant.core.program import Program
from fxquant.core.progress import SILENT, Reporter
from fxquant.passes.base import Pass

Simulate = Callable[[BitAllocation], GraphModule]
"""Plan -> simulated graph."""


def measured_loss(module: GraphModule, images: CalibrationSet, reference: Tensor, loss: str, batch: int = 32) -> float:
    """Return the mean loss of a simulated graph against the float answers, over all images."""
    answer = model_outputs(module, images.inputs, batch)
    return float(LOSSES[loss](reference, answer, images.labels).mean())


@dataclass(frozen=True)
class VerifyAndRefine(Pass):
    """Rewrite `BitAllocation` with the finalist of least measured loss; ties go to the surrogates' own order.

    Args:
        images: calibration images that were not used for scoring.
        simulate: makes the simulated graph of a plan.
        loss: name of the loss.
        reporter: shows progress.
    """

    images: CalibrationSet = field(repr=False)
    simulate: Simulate = field(repr=False)
    loss: str = "kl"
    reporter: Reporter = field(default=SILENT, repr=False)
    reads = (Finalists,)
    writes = (BitAllocation,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with the measured plan."""
        plans = program[Finalists].plans
        with torch.no_grad():
            reference = model_outputs(program.module, self.images.inputs, 32)
        losses: dict[str, float] = {}
        known: dict[tuple[tuple[str, str], ...], float] = {}
        for name, plan in self.reporter.track(plans.items(), "verify plans", len(plans)):
            key = tuple((site, choice.label) for site, choice in plan.choices.items())
            if key not in known:
                known[key] = measured_loss(self.simulate(plan), self.images, reference, self.loss)
            losses[name] = known[key]
        # A plan that overflows has no loss, and compares as neither better nor worse.
        best = min(losses, key=lambda name: math.inf if math.isnan(losses[name]) else losses[name])
        return program.with_facts(replace(plans[best], measured_loss=losses[best], finalists=losses)), 0
