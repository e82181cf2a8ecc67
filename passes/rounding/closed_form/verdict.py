"""Accept or reject what an algorithm found for the whole network, and record it."""

from __future__ import annotations

from dataclasses import replace

from fxquant.core.errors import OptionError
from fxquant.core.facts import Rounding, UnitRecord
from fxquant.core.ir import Program
from fxquant.core.run import loss_of, model_outputs
from fxquant.passes.rounding.acceptance import record_of, rejection
from fxquant.passes.rounding.registry import RoundingTask


def held_out_losses(
    task: RoundingTask, rounding: Rounding, program: Program | None = None
) -> tuple[float, float] | tuple[None, None]:
    """Return the mean loss on the held-out images of the plan as it was and with the rounding; None without images."""
    if task.held_out is None:
        return None, None
    changed = task if program is None else replace(task, program=program)
    inputs, labels, loss = task.held_out.inputs, task.held_out.labels, loss_of(task.loss)
    reference = model_outputs(task.program.module, inputs)
    before, after = (
        float(loss(reference, model_outputs(simulated.module, inputs), labels).mean())
        for simulated in (task.simulated(), changed.simulated(rounding))
    )
    return before, after


def judged(
    task: RoundingTask, rounding: Rounding, method: str, seconds: float, program: Program | None = None
) -> Program:
    """Return the task's program with the rounding, or as it was where the held-out loss does not fall; recorded.

    Args:
        task: the plan.
        rounding: the algorithm's.
        method: the algorithm.
        seconds: its wall time.
        program: where the algorithm changed the network itself, the changed one.
    """
    before, after = held_out_losses(task, rounding, program)
    reason = rejection(before, after, task.loss)
    return recorded(task, rounding, record_of(first_site(task), method, before, after, reason, seconds), program)


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
