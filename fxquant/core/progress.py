"""Progress with an estimate of what remains; silent where nobody watches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

log = logging.getLogger(__name__)


class Reporter:
    """Shows one bar per stage with elapsed and remaining time.

    Args:
        enabled: False for silence; True shows bars on a terminal and nothing when stderr is not one.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled and sys.stderr.isatty()

    def track(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        """Yield the items, a bar advancing with each."""
        if not self.enabled:
            yield from items
            return
        with self._bar() as bar:
            task = bar.add_task(title, total=total)
            for item in items:
                yield item
                bar.advance(task)

    def say(self, text: str) -> None:
        """Print one line where bars are shown, and log it as information elsewhere."""
        if self.enabled:
            Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
        else:
            log.info("%s", text)

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


SILENT = Reporter(enabled=False)
"""Reports nothing."""
