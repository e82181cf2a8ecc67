"""Replace a set of files as one: they are made in a separate folder and moved in, and a killed move can be finished.

The move has a point of no return. Before it the earlier set is untouched; after it the new set lies whole in a folder
named `READY`, and the next process that opens the folder, reader or writer, finishes a move that was killed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from fxquant.core.errors import FileFormatError, OutputError
from fxquant.core.storage.codecs import read_json, write_json
from fxquant.core.storage.files import UNFINISHED, flush_to_disk, unwritable

READY = ".ready"
"""Folder with a whole set that has yet to be moved in."""
LIST = "files.json"
"""Names of all files of the set, those that have been moved among them, and of the earlier ones that go."""
FORMAT_VERSION = 1

RESULT = (
    *(
        "result.json",
        "plan.json",
        "channel_scales.npz",
        "ranges.npz",
        "model.pt2",
        "held_out.safetensors",
        "scoring.safetensors",
        "sensitivity_*.npz",
    ),
    *("rounded_weights.npz", "rounding.npz", "trained.npz", "target.json"),
    *("hard_plan.json", "hard_rounding.npz", "easy_plan.json", "easy_rounding.npz"),
)
"""Patterns of the files of a saved result."""
OUTPUT = (
    *RESULT,
    "model.onnx",
    "model.onnx.data",
    "model.routed.onnx",
    "model.routed.onnx.data",
    "report.html",
    "report.json",
)
"""Patterns of the files that a command writes: a saved result, what runs and what tells of it."""
MOVABLE = (*OUTPUT, "model.*")
"""Patterns of all names that a move may touch: a backend may export a file of another kind."""


@contextmanager
def staged(folder: Path, own: Sequence[str]) -> Iterator[Path]:
    """Yield an empty folder whose files take the place of an earlier set in `folder` if the block succeeds.

    Args:
        folder: where the set belongs; made if it is not there.
        own: patterns of the set's file names, some of `MOVABLE`; earlier files that match and have no new one go.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        finish(folder)
        staging = Path(tempfile.mkdtemp(dir=folder, prefix=UNFINISHED))
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield staging
        names = sorted(path.name for path in staging.iterdir())
        for name in names:
            flush_to_disk(staging / name)
        stale = sorted({path.name for pattern in own for path in folder.glob(pattern)} - set(names))
        write_json(staging / LIST, "files", FORMAT_VERSION, {"files": names, "stale": stale})
        staging.replace(folder / READY)
        finish(folder)
    except OutputError as error:
        # The user knows nothing of the folder that the files were made in.
        raise OutputError(str(error).replace(str(staging), str(folder))) from error
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def finish(folder: Path) -> bool:
    """Finish a move that was stopped, and return whether there was one.

    Two processes that do so at the same time do the same.

    Raises:
        OutputError: the folder cannot be written.
        FileFormatError: what is there was not left by a move.
    """
    ready = folder / READY
    if not ready.is_dir():
        return False
    if ready.is_symlink():
        raise FileFormatError(f"{ready} is a link, which fxquant never makes; remove it")
    # Without a list all files are in their place: it goes last.
    if (ready / LIST).is_file():
        document = read_json(ready / LIST, "files", FORMAT_VERSION)
        names, stale = (_names(document.get(key), ready) for key in ("files", "stale"))
        try:
            for name in stale:
                (folder / name).unlink(missing_ok=True)
            for name in names:
                # One that is not there any more was moved before the stop, or just now by another process.
                with suppress(FileNotFoundError):
                    (ready / name).replace(folder / name)
            (ready / LIST).unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from error
    shutil.rmtree(ready, ignore_errors=True)
    return True


def _names(listed: object, ready: Path) -> list[str]:
    """Return the names in a list that a move left, each of them one that a move may touch."""
    names: list[str] = []
    for name in listed if isinstance(listed, list) else [None]:
        if not isinstance(name, str) or "/" in name or "\\" in name or not any(fnmatch(name, own) for own in MOVABLE):
            raise FileFormatError(f"{ready / LIST} names {name!r}, which fxquant never moves; remove {ready}")
        names.append(name)
    return names


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written in a folder and those below it; for its only writer."""
    for path in sorted(folder.rglob(f"{UNFINISHED}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
