"""Parts of a saved result that need a check of their own: images that fit, names of files, matrices, roundings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxquant import flow
from fxquant.core.errors import FileFormatError, OptionError, PipelineError
from fxquant.core.facts import (
    EASY,
    HARD,
    BitAllocation,
    Rounding,
    RouteFit,
    Routes,
    SensitivityMatrix,
    Settings,
    Target,
    WeightGrids,
)
from fxquant.core.ir import Candidate, Program
from fxquant.core.run import CalibrationSet
from fxquant.core.storage import text_digest
from fxquant.passes import ScaleWeights, channel_axes
from fxquant.qat import with_values

IMAGES_LIMIT = 64 * 10**6
"""Bytes of calibration images that a saved result carries at most, to verify and round new plans with."""


def images_that_fit(images: Mapping[str, CalibrationSet | None]) -> dict[str, CalibrationSet]:
    """Return file name -> images, the first of them that together take no more than `IMAGES_LIMIT` bytes."""
    kept: dict[str, CalibrationSet] = {}
    for name, each in images.items():
        if each is None or sum(known.bytes for known in kept.values()) + each.bytes > IMAGES_LIMIT:
            break
        kept[name] = each
    return kept


def plan_digest(plan: BitAllocation) -> str:
    """Return a digest of the choices, which says whether a person has edited them."""
    return text_digest(json.dumps(plan.to_json()["choices"], sort_keys=True))


def file_name(name: str) -> str:
    """Return an estimator's name if it can be part of a file name, since `save` uses it as one."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w+-]+", name):
        raise ValueError(f"estimator {name!r}")
    return name


def load_matrix(path: Path, candidates: tuple[Candidate, ...]) -> SensitivityMatrix:
    """Return the matrix of a file.

    Raises:
        FileFormatError: it is damaged, or has other candidates.
    """
    matrix = SensitivityMatrix.load(path)
    if matrix.candidates != candidates:
        raise FileFormatError(f"{path} belongs to another model or other settings; restore it or quantize again")
    return matrix


def with_rounding(program: Program, path: Path) -> Program:
    """Restore a rounding and the float parameters it changed; to be done before weights get their scales."""
    rounding = Rounding.load(path)
    try:
        return with_values(program, rounding.parameters).with_facts(rounding)
    except (OptionError, PipelineError) as error:
        raise FileFormatError(f"{path} belongs to another model ({error}); restore it or quantize again") from error


def rounded_program(program: Program, folder: Path, document: Mapping[str, Any], part: str = "") -> Program:
    """Return a program with its saved rounding and the grids of its weights.

    Args:
        program: with ranges, without a rounding.
        folder: where it was saved.
        document: what `result.json` holds.
        part: what the names of the files of one of its routes begin with.

    Raises:
        FileFormatError: a file is missing, damaged, or of another network.
    """
    if bool(document.get(f"{part}rounding")):
        program = with_rounding(program, folder / f"{part}rounding.npz")
    grids = WeightGrids({})
    if bool(document.get("bank", program[Settings].scoring_rounding != "nearest")):
        grids = grids.with_rounded(folder / "rounded_weights.npz", channel_axes(program))
    return flow.run(program, ScaleWeights(program[Target].per_channel, grids))


def write_routes(routes: Routes, folder: Path) -> dict[str, Any]:
    """Write the plans and roundings of routes, and return what `result.json` says of them.

    Raises:
        OutputError: the folder cannot be written.
    """
    document: dict[str, Any] = {"routes": routes.fit.to_json()}
    for name, program in routes.plans.items():
        program[BitAllocation].to_json(folder / f"{name}_plan.json")
        document[f"{name}_rounding"] = Rounding in program
        if Rounding in program:
            program[Rounding].save(folder / f"{name}_rounding.npz")
    return document


def read_routes(program: Program, folder: Path, document: Mapping[str, Any]) -> Routes:
    """Return the routes that `write_routes` wrote.

    Args:
        program: with ranges, without a rounding.
        folder: where they were written.
        document: what `result.json` holds.

    Raises:
        FileFormatError: a file is missing, damaged, or of another network.
    """
    try:
        fit = RouteFit.from_json(document["routes"])
        plans = {}
        for name in (HARD, EASY):
            made = rounded_program(program, folder, document, f"{name}_")
            plans[name] = flow.impose(made, BitAllocation.from_json(folder / f"{name}_plan.json"))
        return Routes(plans, fit)
    except (KeyError, TypeError, ValueError, AttributeError, OptionError) as error:
        raise FileFormatError(f"{folder} holds no intact routes ({error}); quantize again") from error
