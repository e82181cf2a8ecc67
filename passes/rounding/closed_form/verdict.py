"""Whether what a closed-form algorithm found stays: held-out images decide over the whole network."""

from __future__ import annotations

from dataclasses import replace

from fxquant.core.errors import OptionError
from fxquant.core.facts import Rounding, UnitRecord
from fxquant.core.ir import Program
from fxquant.core.run import LOSSES, model_outputs
from fxquant.passes.rounding.registry import RoundingTask

NAN = float("nan")
UNMEASURED = (NAN, NAN)


def held_out_losses(task: RoundingTask, rounding: Rounding, program: Program | None = None) -> tuple[float, float]:
    """Return the mean loss on the held-out images of the plan as it was and with the rounding; NaN without images."""
    if task.held_out is None:
        return UNMEASURED
    changed = task if program is None else replace(task, program=program)
    inputs, labels, loss = task.held_out.inputs, task.held_out.labels, LOSSES[task.loss]
    reference = model_outputs(task.program.module, inputs)
    before, after = (
        float(loss(reference, model_outputs(simulated.module, inputs), labels).mean())
        for simulated in (task.simulated(), changed.simulated(rounding))
    )
    return before, after


def judged(
    task: RoundingTask, rounding: Rounding, method: str, seconds: float, program: Program | None = None
) -> Program:
    """Return the task's program with the rounding, or as it was where held-out images answer worse; recorded.

    Args:
        task: the plan.
        rounding: what the algorithm chose.
        method: the algorithm.
        seconds: what it took.
        program: where the algorithm changed the network itself, the changed one.
    """
    before, after = held_out_losses(task, rounding, program)
    # A loss that is not a number is never an improvement; one that was not measured is never a reason.
    kept = task.held_out is None or after <= before
    reason = "" if kept else f"held-out {task.loss} rises from {before:.4g} to {after:.4g}"
    return recorded(task, rounding, UnitRecord(first_site(task), method, before, after, kept, reason, seconds), program)


def recorded(task: RoundingTask, rounding: Rounding, record: UnitRecord, program: Program | None = None) -> Program:
    """Return the task's program with the record, and with the rounding where the record says that it stays."""
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
