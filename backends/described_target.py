"""The backend of a described target: its file decides what is quantized, another backend stands in to run it here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.fx import GraphModule

from fxquant.backends.base import BACKENDS, Backend, Executable, backend
from fxquant.core.errors import OptionError
from fxquant.core.facts import SUFFIX, Described, Settings, read_target, to_json, write_target
from fxquant.core.storage import text_digest

KEPT = "target.json"
"""Name under which a saved result keeps the target it was made for."""

_KNOWN: dict[Path, tuple[int, Described]] = {}


def described(path: Path) -> Described:
    """Return what a target file says; one that was read before and is gone now still counts, so that no work is lost.

    Raises:
        FileFormatError: missing, damaged or not a target file.
        OptionError: a value out of range.
    """
    place = path.absolute()
    stamp = place.stat().st_mtime_ns if place.is_file() else None
    known = _KNOWN.get(place)
    if known is None or stamp not in (None, known[0]):
        known = (stamp or 0, read_target(path))
        _KNOWN[place] = known
    return known[1]


def identity(name: str) -> str:
    """Return what a target's results depend on: its name, or what its file says, wherever it lies."""
    if not name.endswith(SUFFIX):
        return name
    return text_digest(json.dumps(to_json(described(Path(name))), sort_keys=True))


def keep_target(settings: Settings, folder: Path) -> None:
    """Write a copy of a described target beside a result, which then needs no other file.

    Raises:
        OutputError: the folder cannot be written.
    """
    if settings.target.endswith(SUFFIX):
        write_target(folder / KEPT, described(Path(settings.target)))


def kept_target(settings: Settings, folder: Path) -> Settings:
    """Return settings that name the copy `keep_target` wrote, unchanged where the target is no file."""
    return replace(settings, target=str(folder / KEPT)) if settings.target.endswith(SUFFIX) else settings


class DescribedBackend:
    """A target from a file.

    Args:
        path: the target file.

    Raises:
        FileFormatError: missing, damaged or not a target file.
        OptionError: a value out of range, or `runs_on` names no backend.
    """

    def __init__(self, path: Path) -> None:
        told = described(path)
        if told.runs_on not in BACKENDS:
            raise OptionError(f"{path}: runs_on={told.runs_on!r} is unknown; known: {', '.join(BACKENDS)}")
        self.target = told.target
        self._stand_in: Backend = backend(told.runs_on)

    def compile(self, module: GraphModule, inputs: tuple[Tensor, ...], threads: int | None = None) -> Executable:
        """Make a graph run in the backend that stands in; its milliseconds say nothing about the target's."""
        return self._stand_in.compile(module, inputs, threads)
