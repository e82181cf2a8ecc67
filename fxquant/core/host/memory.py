"""Out-of-memory diagnostics, and returning freed heap to the operating system."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fxquant.core.errors import MemoryLimitError, first_line

SIGNS = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc", "failed to allocate memory")
"""What torch and the runtimes say in errors that have no class of their own."""


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it and has a call for that (glibc).

    Blocks of a few megabytes, which is what activations are, stay with the process after a backward pass otherwise:
    gigabytes that the next stage, or another process, could use.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory was short: Python's, NumPy's, torch's or a runtime's own."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS))


@contextmanager
def memory_named(stage: str, advice: str) -> Iterator[None]:
    """Turn a lack of memory in the block into an error that names the stage and the way out.

    Args:
        stage: what was being done.
        advice: what the user can turn down.

    Raises:
        MemoryLimitError: the block ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        raise MemoryLimitError(f"{stage} needs more memory than there is ({first_line(error)}); {advice}") from error
