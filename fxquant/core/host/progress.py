"""Progress with an estimate of what remains: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fxquant.core.host.memory import give_back

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
        self._stages: tuple[str, ...] = ()
        self._title, self._began, self._spoke, self._bars = "", 0.0, 0.0, 0

    @contextmanager
    def stages(self, names: Sequence[str]) -> Iterator[None]:
        """Number the stages that `stage` announces in this block; whatever is silent for 30 seconds is named again.

        Args:
            names: what will be done, in order.
        """
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,), daemon=True)
        self._stages = tuple(names) if self.enabled else ()
        try:
            if self.enabled:
                watcher.start()
            yield
        finally:
            done.set()
            if self.enabled:
                watcher.join()
            self._stages, self._title = (), ""

    def stage(self, name: str) -> None:
        """Say that a stage begins, as `3 of 7: score layers`; nothing if it is none of the numbered ones.

        What the one before it freed is given back to the system.
        """
        give_back()
        if name in self._stages:
            self._title, self._began = (
                f"{self._stages.index(name) + 1} of {len(self._stages)}: {name}",
                time.monotonic(),
            )
            self.say(self._title)

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
            return self._with_bar(items, title, total)
        return self._with_lines(items, title, total, time.monotonic())

    def say(self, text: str) -> None:
        """Print one line on stderr; in silence, log it as information."""
        self._spoke = time.monotonic()
        if self.on_terminal:
            Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
        elif self.enabled:
            _write(sys.stderr, text)
        else:
            log.info("%s", text)

    def _watch(self, done: threading.Event) -> None:
        """Name the stage again after each half minute in which nothing was said and no bar was moving."""
        while not done.wait(LINE_EVERY / 10):
            now = time.monotonic()
            if self._title and not self._bars and now - self._spoke >= LINE_EVERY:
                self.say(f"{self._title}, {seconds_text(now - self._began)} so far")

    def _with_bar(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bars += 1
        try:
            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task(title, total=total)
                for item in items:
                    yield item
                    bar.advance(task)
        finally:
            self._bars -= 1
            self._spoke = time.monotonic()

    def _with_lines(self, items: Iterable[T], title: str, total: int, started: float) -> Iterator[T]:
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
                    self.say(f"{title}: {done} of {total} after {time_text}")
        finally:
            if total:
                self.say(f"{title}: {done} of {total} in {seconds_text(time.monotonic() - started)}")


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
