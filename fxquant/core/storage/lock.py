"""Folder lock for one writer, released by the operating system when the process exits."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fxquant.core.errors import BusyFolderError
from fxquant.core.storage.files import unwritable

LOCK, HOLDER = ".lock", ".lock-holder"
"""The locked file, and the one that names its process; both are removed at the end."""
PATIENCE = 0.1
"""Seconds to try: a lock file that its holder removes at this moment needs a second attempt."""
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of file systems that have no locks, such as some network mounts."""

log = logging.getLogger(__name__)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, and other threads of this one, that would write results to it.

    The file that a killed process leaves does not block: the system's lock on it is gone with the process.

    Args:
        folder: an existing folder.

    Raises:
        BusyFolderError: another run holds it; the message names its process and machine.
        OutputError: the lock file cannot be written.
    """
    path, holder = folder / LOCK, folder / HOLDER
    lock = FileLock(path, timeout=PATIENCE, poll_interval=PATIENCE / 4)
    try:
        lock.acquire()
    except Timeout as error:
        raise BusyFolderError(
            f"{folder} is being written by {_described(holder)}; wait for it to end, or give another folder"
        ) from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise unwritable(path, error) from error
        log.warning("%s cannot be locked (%s); do not start two runs on this folder", path, error)
    try:
        try:
            holder.write_text(json.dumps({"pid": os.getpid(), "host": platform.node()}), encoding="utf-8")
        except OSError as error:
            raise unwritable(holder, error) from error
        yield
    finally:
        # Removed while still held: a process that has opened this very file sees that it is gone and makes a new one.
        for made in (holder, path):
            with suppress(OSError):
                made.unlink(missing_ok=True)
        lock.release()


def _described(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        return f"another run, process {int(found['pid'])} on {str(found['host'])[:64]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run, which has just started"
