"""Score the candidates: around the float network, or around a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from fxquant.core.facts import (
    EFFORTS,
    BitAllocation,
    ChannelScales,
    Ranges,
    SensitivityMatrix,
    Settings,
    Surrogates,
    Target,
    WeightGrids,
    target_to_json,
)
from fxquant.core.host import ALONE, SILENT, Reporter, Shards
from fxquant.core.ir import Program, Sites
from fxquant.core.run import CalibrationSet, Loss, answer_loss, can_mix, find_answers, judging_images
from fxquant.core.storage import ScoreStore, StoredProgram, tensor_digest, text_digest
from fxquant.flow.judged_images import compared_images, taken_images
from fxquant.passes import MeasureSensitivity, simulate, widest_plan
from fxquant.passes.sensitivity import ESTIMATORS

SCORED_PLANS = 24
"""Scoring may take the work of measuring so many plans."""
GRADIENT_RUNS = 3
"""What a forward and a backward pass take, in forward passes; beside them each candidate runs its own layer once."""
NOT_SCORED = "none"
"""Stands for an estimator where there is nothing to choose."""


def loss_in_use(program: Program, images: CalibrationSet) -> Loss:
    """Return the loss in use: the one asked for, or the one that fits the model's outputs."""
    return answer_loss(program[Settings].loss, program.module, images.slice(0, 1).inputs)


def answer_note(program: Program) -> tuple[str, ...]:
    """Return a note on what losses compare where that is not the model's first output, else nothing.

    Raises:
        CaptureError: the model returns nothing that can be compared.
    """
    notes = [answer.note for answer in find_answers(program.module.graph)[:1]]
    return tuple(f"losses compare {note}" for note in notes if note)


def judging(program: Program, images: CalibrationSet) -> CalibrationSet:
    """Return the images that plans of a program are measured on, made of calibration images: `judging_images`."""
    return judging_images(images, loss_in_use(program, images), program[Settings].seed, moving=False)


def judged_on(
    program: Program, scoring: CalibrationSet | None, held_out: CalibrationSet | None
) -> CalibrationSet | None:
    """Return the images that plans are measured on; None where there are none that scoring did not see.

    All calibration images mixed in pairs, and the held-out ones once more as they are: of what `benchmarks.verdict`
    compares, they pick the best plans.
    """
    if held_out is None:
        return None
    # Where answers are limited, more images are held out than it takes to compare plans.
    held_out = compared_images(held_out, program[Settings])
    images = held_out if scoring is None else taken_images(scoring, program[Settings]).joined(held_out)
    loss, seed = loss_in_use(program, images), program[Settings].seed
    once, twice = len(images), len(held_out) if can_mix(images, loss) else 0
    # Large networks are judged on fewer of them, so that a plan of theirs is measured in seconds.
    image, effort = sum(site.macs for site in program[Sites].sites), EFFORTS[program[Settings].effort]
    affordable = min(effort.work / max(1, image), once + twice)
    taken = spread(once + twice, max(effort.least_judged, int(affordable)))
    judged = judging_images(images, loss, seed, moving=False, only=[k for k in taken if k < once])
    # Before the held-out ones come once more.
    del images
    again = [k - once for k in taken if k >= once]
    return judged.joined(held_out.take(again)) if again else judged


def measure_sensitivity(
    program: Program,
    images: CalibrationSet,
    folder: Path | None = None,
    reporter: Reporter = SILENT,
    shards: Shards = ALONE,
) -> Program:
    """Score every candidate, alone and in pairs, with the estimators and in the context of the settings.

    Args:
        program, images, folder, reporter, shards: as for `score`.

    Raises:
        FileFormatError, WorkerError: as for `score`.
    """
    settings = program[Settings]
    if not has_choice(program):
        return program.with_facts(*_unscored(program, loss_in_use(program, images)))
    context = widest_plan(program) if settings.context == "widest" else None
    scored = score(program, images, settings.estimators, context, folder, reporter, shards)
    # The log gets the time of scoring, but its simulated graph is dropped.
    return replace(program.with_facts(scored[SensitivityMatrix], scored[Surrogates]), log=scored.log)


def has_choice(program: Program) -> bool:
    """Whether any site has more than one choice."""
    return any(len(site.choices) > 1 for site in program[Sites].sites)


def _unscored(program: Program, loss: Loss) -> tuple[SensitivityMatrix, Surrogates]:
    """Return scores of nothing, for programs in which there is nothing to choose."""
    candidates = program[Sites].candidates
    nothing, unknown = np.zeros((len(candidates),) * 2), np.full((len(candidates),) * 2, np.nan)
    matrix = SensitivityMatrix(candidates, nothing, unknown, NOT_SCORED, 0.0, loss.unit)
    return matrix, Surrogates({NOT_SCORED: matrix})


def score(
    program: Program,
    images: CalibrationSet,
    estimators: tuple[str, ...],
    context: BitAllocation | None,
    folder: Path | None = None,
    reporter: Reporter = SILENT,
    shards: Shards = ALONE,
) -> Program:
    """Return the simulated program with its scores.

    Args:
        program: calibrated.
        images: calibration images; as many of them as the effort says, moved and mixed in pairs, are scored on.
        estimators: names, the preferred one first.
        context: the plan that everything else is quantized by; None leaves everything else in float.
        folder: keeps finished scores, from which a killed run resumes; None keeps none.
        reporter: shows progress.
        shards: this process among those that share the work; all of them return the same.

    Raises:
        FileFormatError: the folder holds scores of something else; the message names what.
        WorkerError: another process that shares the work was lost, or was given something else.
    """
    loss, seed, device = loss_in_use(program, images), program[Settings].seed, images.inputs[0].device
    images = images.take(spread(len(images), _scored_images(program, estimators)))
    images = judging_images(images, loss, seed)
    with shards.group(device):
        known = score_identity(program, images, loss) if folder is not None or shards.world_size > 1 else {}
        # Compared before any process writes: a folder that all of them found empty is still empty here.
        shards.agree(text_digest(f"{known} {estimators} {seed}"), device)
        store = ScoreStore(folder, known)
        # Without rounded biases, nothing but the substitutions differs from the float network.
        simulated = simulate(program, widest_plan(program), round_biases=False)
        return MeasureSensitivity(images, estimators, loss, store, reporter, seed, shards, context)(simulated)


def _scored_images(program: Program, estimators: tuple[str, ...]) -> int:
    """Return how many images to score on at most, of large networks fewer."""
    effort, sites = EFFORTS[program[Settings].effort], program[Sites].sites
    macs = sum(site.macs for site in sites)
    if any(ESTIMATORS[name].measured for name in estimators):
        # A candidate runs what lies behind it, half of the network on average.
        image = macs * sum(len(site.choices) for site in sites) / 2
    else:
        image = GRADIENT_RUNS * macs + sum(site.macs * len(site.choices) for site in sites)
    affordable = min(SCORED_PLANS * effort.work / max(1.0, image), effort.scored)
    return min(effort.scored, max(effort.least_scored, int(affordable)))


def spread(count: int, most: int) -> list[int]:
    """Return at most so many positions of images, evenly spread: loaders may yield class by class."""
    return list(range(count)) if count <= most else [k * count // most for k in range(most)]


def score_identity(program: Program, images: CalibrationSet, loss: Loss) -> dict[str, str]:
    """Return field -> digest of what scores depend on."""
    module = program.module
    columns = [f"{c.site}:{c.choice.label}" for c in program[Sites].candidates]
    tensors = {f"input {i}": tensor for i, tensor in enumerate(images.inputs)}
    if loss.needs_labels and images.labels is not None:
        tensors["labels"] = images.labels
    scales = program[ChannelScales] if ChannelScales in program else ChannelScales()
    # Equalized weights are as much the images' as the model's.
    named = program[StoredProgram].exported.state_dict if scales.paths else module.state_dict()
    weights = {name: tensor for name, tensor in named.items() if tensor.numel()}
    settings, target = program[Settings], json.dumps(target_to_json(program[Target]), sort_keys=True)
    # Rounded, so that another summation order on the same images stays the same calibration.
    seen = [
        f"{name} {h.minimum:.4g} {h.maximum:.4g} {h.counts.sum():g}" for name, h in program[Ranges].histograms.items()
    ]
    return {
        "calibration": text_digest(f"{seen} {program[Ranges].clip}"),
        "model": tensor_digest(weights) + text_digest(str(module.graph)),
        "data": tensor_digest(tensors),
        "settings": text_digest(f"{columns} {loss} {settings.observer} {target} {program[WeightGrids].digest()}"),
    }
