"""A process that sweeps a small network in child processes that die on demand: `python -m tests.sweeper`.

Each line read is `folder answer cell delay`; a child scores into the folder and saves its matrix as `answer`. It dies
`delay` seconds of its processor time after it begins to write that many cells; never if `cell` is 0. Its status is
printed when it has ended. Forking saves the seconds that imports and export take.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fxquant.core.run import CalibrationSet
from fxquant.core.storage import Arrays, ScoreStore
from fxquant.passes.sensitivity import ESTIMATORS, Cell, Scorer
from tests.scoring import inputs, simulated

pairs = ESTIMATORS["pairs"]


IDENTITY = {"model": "plain", "data": "six images"}
IMAGES = 6
CELLS = 1 + 9 * IMAGES
"""One of single choices, of six images, and of each image alone one for each row of pairs."""


class Noted(ScoreStore):
    """Writes down each cell that is put, so that what was measured twice shows; dies as the line says."""

    dies_at, delay = 0, 0.0

    def put(self, key: str, cell: Mapping[str, object] | Cell) -> Arrays:
        """Note the key in one write, then keep the cell."""
        assert self.folder is not None
        log = os.open(self.folder.with_suffix(".log"), os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        os.write(log, f"{key}\n".encode())
        os.close(log)
        self.dies_at -= 1
        if self.dies_at == 0:
            # The kernel kills, whatever runs then; counted in processor time, a busy machine changes nothing.
            signal.setitimer(signal.ITIMER_PROF, self.delay)
        arrays = {name: np.asarray(value) for name, value in cell.items()}
        return super().put(key, arrays)


def sweep(folder: Path, answer: Path, dies_at: int, delay: float) -> None:
    """Score the network into a folder and save the matrix."""
    store = Noted(folder, IDENTITY)
    store.dies_at, store.delay = dies_at, delay
    scorer = Scorer(simulated("plain"), CalibrationSet(inputs("plain", IMAGES)), "kl", store)
    scorer.batch = 1
    found = pairs(scorer)
    np.savez(answer, values=found.values, stderr=found.stderr, evaluations=np.float64(found.evaluations))


def main() -> None:
    """Serve until the input ends."""
    # A forked child has none of its parent's threads.
    torch.set_num_threads(1)
    _ = simulated("plain")
    print("ready", flush=True)
    for line in sys.stdin:
        folder, answer, dies_at, delay = line.split()
        number = os.fork()
        if number == 0:
            sweep(Path(folder), Path(answer), int(dies_at), float(delay))
            os._exit(0)
        threading.Thread(target=_report, args=(number,), daemon=True).start()


def _report(number: int) -> None:
    _, status = os.waitpid(number, 0)
    # One write with its end of line: two children may end at once, and print writes the two apart.
    sys.stdout.write(f"{status}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
