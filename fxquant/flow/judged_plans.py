"""How much uniform plans lose on a few images: what changes of the network before calibration are judged by."""

from __future__ import annotations

from math import log

from torch import Tensor

from fxquant.core.facts import EFFORTS, BitAllocation, Settings, Target
from fxquant.core.ir import Program, Sites, WeightFormat
from fxquant.core.run import CalibrationSet, model_outputs
from fxquant.flow.score import judging, loss_in_use
from fxquant.passes import (
    EVEN,
    Calibrate,
    CollectRanges,
    InsertObservers,
    ScaleWeights,
    measured_loss,
    simulate,
    uniform_plans,
    widest_plan,
    without_observers,
)

JUDGED, FEWEST = 48, 16
"""Calibration images that a change is judged on, and for large networks at least."""
PLANS = 2
"""What is judged may take the work of measuring so many plans."""
LEAST = 1e-12
"""Smallest loss that counts, in its own unit: below it lies the round-off of float32."""

Compared = tuple[CalibrationSet, Tensor]
"""Images to measure on, and the float network's answers to them."""


def affordable(program: Program) -> int:
    """Return how many images a change of the program is judged on."""
    image = sum(site.macs for site in program[Sites].sites)
    most = min(JUDGED, PLANS * EFFORTS[program[Settings].effort].work / max(1, image))
    return max(FEWEST, int(most))


def compared(program: Program, few: CalibrationSet) -> Compared:
    """Return what plans are measured on, made of calibration images; no observer of the program sees them."""
    bare = _bare(program)
    judged = judging(bare, few)
    return judged, model_outputs(bare.module, judged.inputs)


def judged_plans(program: Program) -> list[BitAllocation]:
    """Return the plans that changes are judged by: the middle one and the widest of the uniform plans."""
    plans = [BitAllocation(choices) for choices in uniform_plans(program[Sites].sites).values()]
    even = [plan for plan in plans if _is_even(plan) and not all(c.weights_only for c in plan.choices.values())]
    if not even:
        return [widest_plan(program)]
    return [even[len(even) // 2], *even[-1:]] if len(even) > 1 else even


def log_loss(program: Program, images: CalibrationSet, plans: list[BitAllocation], on: Compared) -> float:
    """Return the sum of the logarithms of the plans' losses, so that each counts by its ratio.

    Weights are rounded to nearest.

    Args:
        program: its sites are found; observers that it has stay as they are.
        images: to calibrate with.
        plans: to measure.
        on: what they are measured on.
    """
    bare = _bare(program)
    passes = (
        InsertObservers(program[Settings].observer),
        Calibrate(images),
        CollectRanges(),
        ScaleWeights(program[Target].per_channel, formats=_formats(plans)),
    )
    for step in passes:
        bare = step(bare)
    loss, (judged, reference) = loss_in_use(bare, images), on
    return sum(log(max(LEAST, measured_loss(simulate(bare, plan).module, judged, reference, loss))) for plan in plans)


def _is_even(plan: BitAllocation) -> bool:
    return all(choice.kind == EVEN and not choice.is_float for choice in plan.choices.values())


def _bare(program: Program) -> Program:
    return Program(without_observers(program.module), program.facts, program.log)


def _formats(plans: list[BitAllocation]) -> tuple[WeightFormat, ...]:
    return tuple(sorted({choice.weight for plan in plans for choice in plan.choices.values() if not choice.is_float}))
