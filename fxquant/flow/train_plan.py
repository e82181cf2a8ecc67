"""Train a plan's network with the method of the settings, kept only if the loss falls on images that it did not see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fxquant.core.errors import CalibrationError, FailureError
from fxquant.core.facts import BitAllocation, Rounding, Settings
from fxquant.core.host import SILENT, Reporter, memory_named
from fxquant.core.ir import Program, gradients
from fxquant.core.run import CalibrationSet, Loss, model_outputs
from fxquant.core.storage import ScoreStore, text_digest
from fxquant.flow.judged_images import taken_images
from fxquant.flow.round_weights import finisher
from fxquant.flow.score import judged_on, judging, loss_in_use, score_identity
from fxquant.flow.stages import TRAIN
from fxquant.passes import measured_loss
from fxquant.passes.rounding import rejection
from fxquant.qat import TRAINERS, TrainingTask, check_count, simulated_plan, training_options

LESS_MEMORY = "give fewer or smaller images, or a smaller batch among the training options"
RATES = (1.0, 1 / 3)
"""Shares of the rate that are tried until the held-out loss falls.

At W4A4 the rate that suits ResNet-20 undoes MobileNetV2 in 100 steps (KL 2.0 to 5.5); a third of it suits it (1.3).
"""


def trained(
    solved: Program,
    images: CalibrationSet,
    held_out: CalibrationSet | None,
    folder: Path | None = None,
    reporter: Reporter = SILENT,
) -> Program:
    """Return the program trained as its settings say, or as it was if the held-out loss does not fall.

    Args:
        solved: calibrated, with the plan, whose weights may have been rounded.
        images: to train on.
        held_out: images that decide; None accepts the training.
        folder: keeps states, from which a killed run resumes; None keeps none.
        reporter: shows progress.

    Raises:
        CalibrationError: fewer images than a batch.
        OptionError: the method cannot choose widths within these limits.
    """
    settings, plan = solved[Settings], solved[BitAllocation]
    name, options = settings.training, training_options(settings.training, settings.training_options)
    if name is None or options is None:
        return solved
    check_count(images, name, options)
    loss = loss_in_use(solved, images)
    known = score_identity(solved, images, loss) if folder is not None else {}
    # A method that chooses widths takes too long to be tried twice.
    given = "weight_lr" in settings.training_options or TRAINERS[name].chooses or held_out is None
    better = solved
    for share in (1.0,) if given else RATES:
        asked = replace(options, weight_lr=options.weight_lr * share)
        key = text_digest(f"{plan.to_json()['choices']} {plan.limits} {asked} {settings.seed} {settings.rounding}")
        store = ScoreStore(None if folder is None else folder / f"{key}-{name}", {**known, "asked": key})
        task = TrainingTask(solved, images, loss, asked, settings.seed, store, reporter)
        try:
            with gradients(), memory_named(name, LESS_MEMORY):
                done = TRAINERS[name].train(task)
        except FailureError as error:
            if share == RATES[-1] or given:
                raise
            reporter.say(f"{name}: {error}; a lower rate is tried")
            continue
        if held_out is None:
            return done
        better, accepted = _better(solved, done, name, images, held_out, loss, reporter)
        if accepted:
            break
    return better


def finished(
    settings: Settings,
    scoring: CalibrationSet | None,
    held_out: CalibrationSet | None,
    reporter: Reporter = SILENT,
    folder: Path | None = None,
    states: Path | None = None,
) -> Callable[[Program], Program]:
    """Return what is done to a solved plan: its weights are rounded, then trained, as the settings say.

    Args:
        settings: of the run.
        scoring: images to round and to train on; None leaves weights as they were scored.
        held_out: images that decide.
        reporter: shows progress.
        folder: keeps finished units of roundings.
        states: keeps states of training.
    """
    taken = None if scoring is None else taken_images(scoring, settings)
    rounded = finisher(settings, taken, held_out, reporter, folder)
    if settings.training is None:
        return rounded
    if scoring is None:
        raise CalibrationError(
            f"training {settings.training!r} needs images, and this result was saved without; give calibration="
        )

    def finish(solved: Program) -> Program:
        made = rounded(solved)
        reporter.stage(TRAIN)
        return trained(made, scoring, held_out, states, reporter)

    return finish


def answers_of(program: Program, images: CalibrationSet, loss: Loss) -> float:
    """Return the mean loss of a program's plan, trained tensors outside of its layers included."""
    reference = model_outputs(program.module, images.inputs)
    return measured_loss(simulated_plan(program).module, images, reference, loss)


def _better(
    solved: Program,
    done: Program,
    name: str,
    images: CalibrationSet,
    held_out: CalibrationSet,
    loss: Loss,
    reporter: Reporter,
) -> tuple[Program, bool]:
    """Return the trained program if its held-out loss is lower, else the solved one with a note; and whether it is."""
    mixed = judging(solved, held_out)
    before, after = (answers_of(each, mixed, loss) for each in (solved, done))
    reason = rejection(before, after, f"held-out {loss}")
    reporter.say(f"{name}: held-out loss {before:.4g} -> {after:.4g}{', rejected' if reason else ''}")
    judged = judged_on(solved, images, held_out)
    assert judged is not None
    plan = solved[BitAllocation]
    if reason:
        kept = Rounding.of(solved, plan.choices)
        note = f"training {name} was rejected: {reason}"
        return solved.with_facts(replace(kept, notes=(*kept.notes, note))), False
    compared = plan.measured_loss
    chosen = replace(done[BitAllocation], measured_loss=compared, loss=plan.loss, compared_loss=None)
    return done.with_facts(chosen.remeasured(answers_of(done, judged, loss), len(judged))), True
