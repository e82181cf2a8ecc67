"""Ctrl-C: the first one stops the work cleanly, the second one ends the process at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""torchrun sends SIGTERM to the other processes when one of them dies; they report it as a stop by hand."""


@contextmanager
def stopped_in_order(terminate: bool = False) -> Iterator[None]:
    """Let the first Ctrl-C within the block raise KeyboardInterrupt, and leave the second one to the system.

    In another thread than the main one nothing is changed: signals do not arrive there.

    Args:
        terminate: raise for SIGTERM as well; once the block is being left, further ones are ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = SIGNALS if terminate else SIGNALS[:1]
    before = {number: signal.getsignal(number) for number in asked}

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        # Cleaning up may hang where the work did; the system ends what Python's own handlers cannot.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if terminate:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in asked:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            # None is a handler that was not installed by Python, and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
