"""Parts of a saved result that need a check of their own: images that fit, names of files, matrices, roundings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from fxquant.core.errors import FileFormatError, OptionError, PipelineError
from fxquant.core.facts import BitAllocation, Rounding, SensitivityMatrix
from fxquant.core.ir import Candidate, Program
from fxquant.core.run import CalibrationSet
from fxquant.core.storage import text_digest
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
