"""What each stage of `fxquant.quantize` takes: processor seconds, seconds, and the peak memory of the process.

A stage is split where passes run in it: what a pass takes counts for that pass alone, the rest for the stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

from fxquant.core.host import Reporter
from fxquant.core.ir import Program
from fxquant.passes import Pass

STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

PARTS = {
    "InsertObservers": "capture",
    "Calibrate": "calibrate",
    "CollectRanges": "calibrate",
    "ScaleWeights": "grids",
    "RoundWeights": "grids",
    "MeasureSensitivity": "score",
    "AllocateBits": "solve",
    "VerifyAndRefine": "verify",
}
"""Pass -> the stage it counts for; a pass that is not named counts for the stage it runs in."""

STAGES = {
    "capture the graph": "capture",
    "calibrate": "calibrate",
    "score layers": "score",
    "choose a plan": "verify",
    "round weights": "round",
    "measure other budgets": "curve",
}
"""Stage as it is numbered for the user -> its name in tables."""

T = TypeVar("T")


def memory_mb(field: str) -> float:
    """Return a field of the process's status, `VmRSS` or `VmHWM` (the peak since it was reset), in 10^6 bytes."""
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


class StageClock:
    """Adds up what stages take, each of them whenever it runs (Linux only: `/proc/self`)."""

    def __init__(self) -> None:
        #: stage -> processor seconds, seconds, peak in 10^6 bytes
        self.taken: dict[str, list[float]] = {}
        #: the stage that is counted for
        self.now = ""
        self._began = (time.process_time(), time.monotonic())

    def switch(self, stage: str) -> str:
        """Count from here on for this stage; return the one that was counted for."""
        now, before = (time.process_time(), time.monotonic()), self.now
        if before:
            taken = self.taken.setdefault(before, [0.0, 0.0, 0.0])
            taken[:2] = [total + end - start for total, end, start in zip(taken, now, self._began, strict=False)]
            taken[2] = max(taken[2], memory_mb("VmHWM"))
        PEAK_RESET.write_text("5", encoding="utf-8")
        self.now, self._began = stage, now
        return before

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block for a stage."""
        before = self.switch(name)
        try:
            yield
        finally:
            _ = self.switch(before)

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        """Return what the work returns, counted for a stage."""
        with self.stage(name):
            return work()

    @contextmanager
    def quantizing(self) -> Iterator[None]:
        """Split calls of `fxquant.quantize` in the block by their stages and passes."""
        clock, call = self, Pass.__call__

        class Clocked(Reporter):
            def stage(self, name: str) -> None:
                super().stage(name)
                if name in STAGES:
                    _ = clock.switch(STAGES[name])

        def clocked(step: Pass, program: Program) -> Program:
            with clock.stage(PARTS.get(type(step).__name__, clock.now)):
                return call(step, program)

        before = self.now
        with patch("fxquant.api.Reporter", Clocked), patch.object(Pass, "__call__", clocked):
            try:
                yield
            finally:
                _ = self.switch(before)
