"""Score the candidates: around the float network, or around a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from fxquant.core.facts import (
    BitAllocation,
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
from fxquant.core.run import LOSSES, CalibrationSet, default_loss, model_outputs
from fxquant.core.storage import ScoreStore, tensor_digest, text_digest
from fxquant.passes import MeasureSensitivity, simulate, widest_plan


def loss_name(program: Program, images: CalibrationSet) -> str:
    """Return the loss in use: the one asked for, or the one that fits the model's output."""
    asked = program[Settings].loss
    if asked is not None:
        _ = LOSSES[asked]
        return asked
    return default_loss(model_outputs(program.module, images.slice(0, 1).inputs))


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
    context = widest_plan(program) if settings.context == "widest" else None
    scored = score(program, images, settings.estimators, context, folder, reporter, shards)
    # The log gets the time of scoring, but its simulated graph is dropped.
    return replace(program.with_facts(scored[SensitivityMatrix], scored[Surrogates]), log=scored.log)


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
        images: the images to score on.
        estimators: names, the preferred one first.
        context: the plan that everything else is quantized by; None leaves everything else in float.
        folder: keeps finished scores, from which a killed run resumes; None keeps none.
        reporter: shows progress.
        shards: this process among those that share the work; all of them return the same.

    Raises:
        FileFormatError: the folder holds scores of something else; the message names what.
        WorkerError: another process that shares the work was lost, or was given something else.
    """
    loss, seed, device = loss_name(program, images), program[Settings].seed, images.inputs[0].device
    with shards.group(device):
        known = score_identity(program, images, loss) if folder is not None or shards.world_size > 1 else {}
        # Compared before any process writes: a folder that all of them found empty is still empty here.
        shards.agree(text_digest(f"{known} {estimators} {seed}"), device)
        store = ScoreStore(folder, known)
        # Without rounded biases, nothing but the substitutions differs from the float network.
        simulated = simulate(program, widest_plan(program), round_biases=False)
        return MeasureSensitivity(images, estimators, loss, store, reporter, seed, shards, context)(simulated)


def score_identity(program: Program, images: CalibrationSet, loss: str) -> dict[str, str]:
    """Return field -> digest of what scores depend on."""
    module = program.module
    columns = [f"{c.site}:{c.choice.label}" for c in program[Sites].candidates]
    tensors = {f"input {i}": tensor for i, tensor in enumerate(images.inputs)}
    if loss == "ce" and images.labels is not None:
        tensors["labels"] = images.labels
    weights = {name: tensor for name, tensor in module.state_dict().items() if tensor.numel()}
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
