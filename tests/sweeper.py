"""A process that sweeps a small network in children of its own, which a test may kill: `python -m tests.sweeper`.

Each line read is `folder answer`; a child scores into the folder and saves its matrix as `answer`. Its number is
printed when it starts, `number status` when it has ended. Forking saves the seconds that imports and export take.
"""

from __future__ import annotations

import os
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
CELLS = IMAGES + 9 * IMAGES
"""Batches of one image: a cell of single choices each, and one for each row of pairs."""


class Noted(ScoreStore):
    """Writes down each cell that is put, so that what was measured twice shows."""

    def put(self, key: str, cell: Mapping[str, object] | Cell) -> Arrays:
        """Note the key in one write, then keep the cell."""
        assert self.folder is not None
        log = os.open(self.folder.with_suffix(".log"), os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        os.write(log, f"{key}\n".encode())
        os.close(log)
        arrays = {name: np.asarray(value) for name, value in cell.items()}
        return super().put(key, arrays)


def sweep(folder: Path, answer: Path) -> None:
    """Score the network into a folder and save the matrix."""
    scorer = Scorer(simulated("plain"), CalibrationSet(inputs("plain", IMAGES)), "kl", Noted(folder, IDENTITY))
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
        folder, answer = map(Path, line.split())
        number = os.fork()
        if number == 0:
            sweep(folder, answer)
            os._exit(0)
        print(number, flush=True)
        threading.Thread(target=_tell, args=(number,), daemon=True).start()


def _tell(number: int) -> None:
    _, status = os.waitpid(number, 0)
    # One write with its end of line: two children may end at once, and print writes the two apart.
    sys.stdout.write(f"{number} {status}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
