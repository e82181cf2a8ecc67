"""Atomic file writes, and errors that say how much room is left."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxquant.core.errors import OutputError

UNFINISHED = ".unfinished-"
"""In front of the name of a file or folder that is being written; what a killed process leaves is called so."""

ADVICE = {
    errno.ENOSPC: "free some space there and run again",
    errno.EDQUOT: "your quota is used up; free some of it and run again",
    errno.EFBIG: "files there may not be that large; choose another folder",
    errno.EIO: "the disk fails; choose a folder on another one",
}
"""Error number -> what to do; for all others another folder is the answer."""


def unwritable(path: Path, error: OSError, written: int = 0) -> OutputError:
    """Return what to raise where a file cannot be written: its path, why, the bytes written and left, what to do.

    Args:
        path: the file or folder that was meant.
        error: what the system said.
        written: bytes that went through before.
    """
    why, known = error.strerror or str(error), error.errno in ADVICE
    room = ""
    if known:
        free = ""
        with suppress(OSError):
            home = next(place for place in (path, *path.parents) if place.is_dir())
            free = f", {shutil.disk_usage(home).free} bytes are free there"
        room = f" after {written} bytes{free}"
    advice = ADVICE.get(error.errno or 0, "choose a writable folder")
    return OutputError(f"cannot write {path}: {why}{room}; {advice}")


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it only if the block succeeds.

    Args:
        path: the file to be.
        durable: wait until the bytes are on the disk, so that not even a power cut leaves a part of the file; False
            for files that tell when they are damaged and are many.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{UNFINISHED}{path.name}.", suffix=path.suffix)
        os.close(handle)
        yield Path(temporary)
        # mkstemp makes files private, and so do writers that put a new file in its place; a result is as readable
        # as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        if durable:
            flush_to_disk(Path(temporary))
        Path(temporary).replace(path)
    except OSError as error:
        raise unwritable(path, error, _size(temporary)) from error
    finally:
        if temporary:
            with suppress(OSError):
                Path(temporary).unlink(missing_ok=True)


def flush_to_disk(file: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    handle = os.open(file, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(file: str) -> int:
    try:
        return Path(file).stat().st_size if file else 0
    except OSError:
        return 0


def check_writable(folder: Path) -> None:
    """Make a folder and write to it, before long work relies on it; nothing is left but the folder.

    Raises:
        OutputError: it cannot be made, or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without a name, so that other processes see no file.
        with tempfile.TemporaryFile(dir=folder, prefix=UNFINISHED) as stream:
            stream.write(bytes(4096))
            stream.flush()
    except OSError as error:
        raise unwritable(folder, error) from error


def work_folder(workdir: str | Path | None, name: str) -> Path | None:
    """Return where a stage keeps what it has finished, None for nowhere; the workdir can be written by then.

    Args:
        workdir: what the user gave.
        name: of the stage's folder in it.

    Raises:
        OutputError: the workdir cannot be written.
    """
    if workdir is None:
        return None
    check_writable(Path(workdir))
    return Path(workdir) / name
