"""One writer for each folder: a lock that the system itself takes back when its holder dies, however it dies."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxquant.core.errors import BusyFolderError
from fxquant.core.storage.files import unwritable

LOCK = ".lock"

log = logging.getLogger(__name__)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, and other threads of this one, that would write results to it.

    The file that a killed process leaves is no lock: the system's lock on it is gone with the process.

    Args:
        folder: an existing folder.

    Raises:
        BusyFolderError: another run holds it; the message names its process and machine.
        OutputError: the lock file cannot be written.
    """
    path = folder / LOCK
    try:
        handle = _locked(path)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode(), 0)
        yield
    finally:
        # Removed while still held: whoever waits for this very file sees that it is gone and makes a new one.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: Path) -> int:
    """Return the handle of the lock file, locked."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(handle, path):
                raise BusyFolderError(
                    f"{path.parent} is being written by {_holder(handle)}; wait for it to end, or give another folder"
                )
            if _is(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, path: Path) -> bool:
    """Return whether this handle has the lock; where there are no locks, say so and go on."""
    try:
        # Locks that belong to the open file: not shared with other threads, gone with the process.
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        log.warning("%s cannot be locked (%s); do not start two runs on this folder", path, error)
    return True


def _is(handle: int, path: Path) -> bool:
    """Whether a path still is the file that was opened: its holder may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    try:
        told = json.loads(os.pread(handle, 4096, 0))
        return f"another run, process {int(told['pid'])} on {str(told['host'])[:64]}"
    except (ValueError, KeyError, TypeError):
        return "another run, which has just started"
