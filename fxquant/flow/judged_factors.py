"""Equalize channels as far as the measured loss of plans falls."""

from __future__ import annotations

from math import log

from torch import Tensor

from fxquant.core.facts import EFFORTS, BitAllocation, ChannelScales, Settings, Target
from fxquant.core.ir import Program, Sites, WeightFormat
from fxquant.core.run import CalibrationSet, model_outputs
from fxquant.flow.score import judging, loss_in_use
from fxquant.passes import (
    EVEN,
    Calibrate,
    CollectRanges,
    EqualizeChannels,
    InsertObservers,
    ScaleWeights,
    measured_loss,
    scaled,
    simulate,
    uniform_plans,
    widest_plan,
    without_observers,
)

SHARES = (1.0, 0.5)
"""Powers of the factors that are tried, beside none of them."""
JUDGED, FEWEST = 48, 16
"""Calibration images that the powers are judged on, and for large networks at least; twice as many tell the noise."""
PLANS = 2
"""What is judged may take the work of measuring so many plans."""
GAIN = 0.1
"""How far the sum of the logarithms of losses must fall: on MobileNetV2 a fall of .07 was none on other images."""
LEAST = 1e-12
"""Smallest loss that counts, in its own unit: below it lies the round-off of float32."""


def equalize(program: Program, images: CalibrationSet) -> Program:
    """Return the program with its channels scaled by the power of their factors that loses least, if by enough.

    A model of rounding noise proposes factors; the losses of uniform plans with weights rounded to nearest decide.

    Args:
        program: from `prepare`, its observers empty.
        images: calibration images.
    """
    image = sum(site.macs for site in program[Sites].sites)
    affordable = min(JUDGED, PLANS * EFFORTS[program[Settings].effort].work / max(1, image))
    count = max(FEWEST, int(affordable))
    proposed = EqualizeChannels(images.slice(0, 2 * count))(program)
    scales = proposed[ChannelScales]
    if not scales.paths:
        return proposed
    few = images.slice(0, count)
    tried = {0.0: scaled(program, ChannelScales())} | {share: scaled(program, scales.power(share)) for share in SHARES}
    plans = _plans(program)
    # The observers of `program` must not see these images; factors leave the answers as they are.
    bare = _bare(program)
    judged = judging(bare, few)
    reference = model_outputs(bare.module, judged.inputs)
    losses = {share: _logarithm(each, few, plans, (judged, reference)) for share, each in tried.items()}
    found = min(losses, key=losses.__getitem__)
    best = tried[found if losses[found] < losses[0.0] - GAIN else 0.0]
    return Program(best.module, best.facts, proposed.log)


def _plans(program: Program) -> list[BitAllocation]:
    """Return the plans that factors are judged by: the middle one and the widest of the uniform plans."""
    plans = [BitAllocation(choices) for choices in uniform_plans(program[Sites].sites).values()]
    even = [plan for plan in plans if _is_even(plan) and not all(c.weights_only for c in plan.choices.values())]
    if not even:
        return [widest_plan(program)]
    return [even[len(even) // 2], *even[-1:]] if len(even) > 1 else even


def _is_even(plan: BitAllocation) -> bool:
    return all(choice.kind == EVEN and not choice.is_float for choice in plan.choices.values())


def _bare(program: Program) -> Program:
    return Program(without_observers(program.module), program.facts, program.log)


def _formats(plans: list[BitAllocation]) -> tuple[WeightFormat, ...]:
    return tuple(sorted({choice.weight for plan in plans for choice in plan.choices.values() if not choice.is_float}))


def _logarithm(
    program: Program, images: CalibrationSet, plans: list[BitAllocation], compared: tuple[CalibrationSet, Tensor]
) -> float:
    """Return the sum of the logarithms of the plans' losses, so that each counts by its ratio.

    Args:
        program: with factors.
        images: to calibrate with.
        plans: to measure.
        compared: images to measure on, and the float network's answers to them.
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
    loss, (judged, reference) = loss_in_use(bare, images), compared
    return sum(log(max(LEAST, measured_loss(simulate(bare, plan).module, judged, reference, loss))) for plan in plans)
