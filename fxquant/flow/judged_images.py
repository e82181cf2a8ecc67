"""The images that answers are judged on: how many there must be, which they are, whether they say anything."""

from __future__ import annotations

from fxquant.core.errors import CalibrationError, OptionError
from fxquant.core.facts import EFFORTS, Budget, Settings
from fxquant.core.ir import Program
from fxquant.core.run import (
    JOIN,
    LOSSES,
    NO_LABELS,
    SPARE,
    CalibrationSet,
    answer_loss,
    first_output,
    learned_share,
    model_outputs,
    needed,
)
from fxquant.qat import check_count, training_options

LEARNED = (
    "the float model is more than 99 % sure of its answer to {share:.0%} of the held-out images, as it is of images it "
    "was trained on: losses and limits on answers look better here than on new images; give images it has not seen"
)


def wanted_images(budget: Budget | None, settings: Settings) -> int:
    """Return how many images answers should be judged on: several times those that could show the limits at all."""
    counts = needed(budget.quality, settings.confidence).values() if budget is not None else ()
    return SPARE * max((count for count in counts if count is not None), default=0)


def most_images(budget: Budget | None, settings: Settings) -> int | None:
    """Return how many calibration images are used at most, None for all: a network is trained on every image."""
    return None if settings.training is not None else EFFORTS[settings.effort].images + wanted_images(budget, settings)


def taken_images(scoring: CalibrationSet, settings: Settings) -> CalibrationSet:
    """Return the images that everything but training uses: no more than the effort takes."""
    return scoring if settings.training is None else scoring.slice(0, EFFORTS[settings.effort].images)


def check_training(images: CalibrationSet, settings: Settings) -> None:
    """Fail before the long work if there are too few images to train on.

    Raises:
        CalibrationError: so it is.
    """
    options = training_options(settings.training, settings.training_options)
    if settings.training is not None and options is not None:
        check_count(images, settings.training, options)


def split_images(
    images: CalibrationSet, budget: Budget | None, settings: Settings
) -> tuple[CalibrationSet, CalibrationSet]:
    """Return (scoring, held-out) parts.

    The settings' share of what the effort takes is held out, and more where answers are limited: images beyond the
    effort's, and up to half of all. Plans are compared on the first of them, so that this takes no longer. Where the
    network is trained, images beyond those are scoring's, which uses the first of them alone.
    """
    taken = EFFORTS[settings.effort].images
    scoring, held_out = images.slice(0, taken).split(settings.held_out, settings.seed)
    wanted = wanted_images(budget, settings)
    if len(images) > taken and wanted > len(held_out):
        more = images.slice(taken, taken + wanted - len(held_out))
        held_out, taken = held_out.joined(more), taken + len(more)
    if settings.training is not None and len(images) > taken:
        scoring = scoring.joined(images.slice(taken, len(images)))
    missing = min(wanted, len(images) // 2) - len(held_out)
    if missing > 0:
        kept = len(scoring) - missing
        scoring, held_out = scoring.slice(0, kept), held_out.joined(scoring.slice(kept, len(scoring)))
    return scoring, held_out


def compared_images(held_out: CalibrationSet, settings: Settings) -> CalibrationSet:
    """Return the held-out images that plans are compared on where more are there to judge answers."""
    return held_out.slice(0, max(1, round(settings.held_out * EFFORTS[settings.effort].images)))


def check_labels(images: CalibrationSet, settings: Settings) -> None:
    """Fail before the long work if the loss compares with labels and the images have none.

    Raises:
        CalibrationError: so it is; the message names the recipe that asks for the loss.
    """
    names = settings.loss.split(JOIN) if isinstance(settings.loss, str) else []
    asking = [name.strip() for name in names if LOSSES[name.strip()].needs_labels]
    if asking and images.labels is None:
        by = f"loss {asking[0]!r}"
        by = f"recipe {settings.recipe!r} judges by {by}, which" if settings.recipe else by
        raise CalibrationError(
            f"{by} needs labels, and the calibration batches hold none, or not one for each image; give batches of "
            "(images, labels), or loss 'kl', which compares with the float network's answers"
        )


def check_answers(budget: Budget | None, held_out: CalibrationSet, settings: Settings) -> None:
    """Fail before the long work if limits on answers cannot be judged by these images, or by any.

    Raises:
        CalibrationError: labels are missing, or there are too few images.
        OptionError: no number of images could show the limit.
    """
    limits = {} if budget is None else budget.quality
    if "accuracy_drop" in limits and held_out.labels is None:
        raise CalibrationError(NO_LABELS)
    for name, count in needed(limits, settings.confidence).items():
        asked = f"{name}={limits[name]:g} at {100 * settings.confidence:g} % confidence"
        if count is None:
            raise OptionError(f"{asked} cannot be shown by any number of images; allow more")
        if count > len(held_out):
            raise CalibrationError(
                f"{asked} needs at least {count} held-out images, even if no answer changes, and there are "
                f"{len(held_out)}; give {2 * count} calibration images or more (half of them are held out), a larger "
                "limit, or a lower confidence"
            )


def learned_note(program: Program, held_out: CalibrationSet) -> tuple[str, ...]:
    """Return a note where the network knows the images too well to be judged by them, else nothing."""
    loss = answer_loss(None, program.module, held_out.slice(0, 1).inputs)
    share = learned_share(first_output(loss, model_outputs(program.module, held_out.inputs)), held_out.labels)
    return () if share is None else (LEARNED.format(share=share),)
