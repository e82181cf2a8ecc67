"""Accept or reject what an algorithm found for the whole network, and record it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch.fx import GraphModule

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, Rounding, UnitRecord
from fxquant.core.ir import Program
from fxquant.core.run import CalibrationSet, Loss, model_outputs
from fxquant.passes.meter import measured_loss
from fxquant.passes.rounding.acceptance import decisive, least, record_of, rejection
from fxquant.passes.rounding.registry import RoundingTask

Losses = tuple[float, ...]
"""Mean loss on each set of images that a verdict looks at."""


def verdict_losses(
    reference: GraphModule,
    candidates: Sequence[Callable[[], GraphModule]],
    images: Sequence[CalibrationSet],
    loss: str | Loss,
) -> list[Losses]:
    """Return the mean losses of each candidate on the sets of images.

    Args:
        reference: the float network.
        candidates: make the networks; one is there at a time.
        images: the sets.
        loss: the loss, or its name.
    """
    expected = [model_outputs(reference, some.inputs) for some in images]
    found = []
    for candidate in candidates:
        module = candidate()
        each = zip(images, expected, strict=True)
        found.append(tuple(measured_loss(module, some, answer, loss) for some, answer in each))
    return found


def judged(
    task: RoundingTask,
    roundings: Rounding | Sequence[Rounding],
    method: str,
    seconds: float,
    program: Program | None = None,
) -> Program:
    """Return the task's program with the best rounding, or as it was where the loss does not fall; recorded.

    What decides is the geometric mean of the loss on the held-out images and of that on the images that plans are
    measured on, where the task has both; the plan holds the latter.

    Args:
        task: the plan.
        roundings: the algorithm's; the first is taken where there is nothing to judge by.
        method: the algorithm.
        seconds: its wall time.
        program: where the algorithm changed the network itself, the changed one.
    """
    found = [roundings] if isinstance(roundings, Rounding) else list(roundings)
    if task.held_out is None:
        return recorded(task, found[0], record_of(first_site(task), method, None, None, "", seconds), program)
    sets = [task.held_out] if task.judging is None else [task.held_out, task.judging()]
    changed = task if program is None else replace(task, program=program)
    candidates = [partial(_network, task, task.rounding), *(partial(_network, changed, each) for each in found)]
    losses = verdict_losses(task.program.module, candidates, sets, task.loss)
    before, *after = (decisive(each) for each in losses)
    best = least(after)
    reason = rejection(before, after[best], task.loss)
    record = record_of(first_site(task), method, before, after[best], reason, seconds)
    chosen = recorded(task, found[best], record, program)
    if task.judging is None:
        return chosen
    plan = replace(task.program[BitAllocation], measured_loss=losses[0][-1], images=len(sets[-1]))
    return chosen.with_facts(plan.remeasured(losses[1 + best][-1], len(sets[-1])) if record.kept else plan)


def _network(task: RoundingTask, rounding: Rounding) -> GraphModule:
    return task.simulated(rounding).module


def recorded(task: RoundingTask, rounding: Rounding, record: UnitRecord, program: Program | None = None) -> Program:
    """Return the task's program with the record, and with the rounding if the record keeps it."""
    if record.kept:
        return task.done(replace(rounding, units=(*task.rounding.units, record)), record.method, program)
    earlier = task.rounding
    return task.program.with_facts(replace(earlier, units=(*earlier.units, record)))


def first_site(task: RoundingTask) -> str:
    """Return the name of the first site that the plan quantizes.

    Raises:
        OptionError: the plan leaves everything in float.
    """
    if not task.sites:
        raise OptionError("the plan leaves every site in float, so there is nothing to round; give one a precision")
    return task.sites[0].name
