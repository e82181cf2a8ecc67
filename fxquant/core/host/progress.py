"""Progress with an estimate of what remains: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

LINE_EVERY = 30.0
"""Seconds between two lines on one stage at least, where stderr is no terminal."""

log = logging.getLogger(__name__)


class Reporter:
    """Shows one bar per stage on a terminal; elsewhere one line per stage, and more every 30 seconds of a long one.

    Args:
        enabled: False for silence.
    """

    def __init__(self, enabled: bool = True) -> None:
        # A program without a console has no stderr at all.
        self.enabled = enabled and sys.stderr is not None
        self.on_terminal = self.enabled and sys.stderr.isatty()

    def track(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        """Yield the items and show how many are done.

        Args:
            items: the work.
            title: what the stage does, for example "score single choices".
            total: number of items.
        """
        if not self.enabled:
            return iter(items)
        if self.on_terminal:
            return self._bars(items, title, total)
        return _lines(items, title, total, sys.stderr, time.monotonic())

    def say(self, text: str) -> None:
        """Print one line on stderr; in silence, log it as information."""
        if self.on_terminal:
            Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
        elif self.enabled:
            _write(sys.stderr, text)
        else:
            log.info("%s", text)

    def _bars(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        with self._bar() as bar:
            task = bar.add_task(title, total=total)
            for item in items:
                yield item
                bar.advance(task)

    @contextmanager
    def _bar(self) -> Iterator[Progress]:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield bar


def _lines(items: Iterable[T], title: str, total: int, stream: TextIO, started: float) -> Iterator[T]:
    """Yield the items; say at the end, or where the loop is left, how many there were and how long they took.

    The work of an item may be done before it is asked for, so time counts from when the stage was announced.
    """
    said, done = started, 0
    try:
        for item in items:
            yield item
            done += 1
            now = time.monotonic()
            if now - said >= LINE_EVERY and done < total:
                said = now
                left = (now - started) / done * (total - done)
                time_text = f"{seconds_text(now - started)}, about {seconds_text(left)} left"
                _write(stream, f"{title}: {done} of {total} after {time_text}")
    finally:
        if total:
            _write(stream, f"{title}: {done} of {total} in {seconds_text(time.monotonic() - started)}")


def _write(stream: TextIO, text: str) -> None:
    """Print a line; a closed pipe does not stop hours of work."""
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError) as error:
        log.debug("progress cannot be written: %s", error)


def seconds_text(seconds: float) -> str:
    """Return `0.3 s`, `12 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


SILENT = Reporter(enabled=False)
"""Reports nothing."""
