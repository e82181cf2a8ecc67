"""Runs that are killed, and runs at the same time: real processes on one folder of scores."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.sweeper import CELLS

ROOT = Path(__file__).parent.parent
KILLS = 5


class Sweeper:
    """The process of `tests.sweeper`, spoken to in lines."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.sweeper"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, folder: Path, answer: Path, dies_at: int = 0, delay: float = 0.0) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder} {answer} {dies_at} {delay}\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """Return the status of the child that ends next."""
        return int(self.line())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def sweeper() -> Iterator[Sweeper]:
    made = Sweeper()
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(sweeper: Sweeper, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The matrix of a run that nothing stopped."""
    place = tmp_path_factory.mktemp("whole")
    sweeper.start(place / "scores", place / "answer.npz")
    assert sweeper.end() == 0
    assert len(measured(place / "scores")) == len(cells(place / "scores")) == CELLS
    return place / "answer.npz"


def cells(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("[!.]*.npz")}


def measured(folder: Path) -> list[str]:
    log = folder.with_suffix(".log")
    return log.read_text().split() if log.exists() else []


def same(one: Path, other: Path) -> bool:
    """Whether values and their errors are the same to the last bit; a run that goes on has spent a little more."""
    with np.load(one) as first, np.load(other) as second:
        return all(first[name].tobytes() == second[name].tobytes() for name in ("values", "stderr"))


def test_killed_at_any_moment_a_sweep_loses_at_most_the_cell_under_way(
    sweeper: Sweeper, whole: Path, tmp_path: Path
) -> None:
    folder, answer = tmp_path / "scores", tmp_path / "answer.npz"
    chance = random.Random()
    for _ in range(KILLS):
        before = len(measured(folder))
        kept = cells(folder)
        sweeper.start(folder, answer, chance.randint(1, 6), chance.uniform(1e-6, 0.01))
        # On a fast machine the last of the kills may come after the last cell.
        assert sweeper.end() == signal.SIGPROF or len(cells(folder)) == CELLS
        # All that was measured is there, but for one cell that may not have been written yet.
        assert kept <= cells(folder)
        assert len(cells(folder)) >= len(kept) + len(measured(folder)) - before - 1
    sweeper.start(folder, answer)
    assert sweeper.end() == 0
    assert same(answer, whole)
    assert len(cells(folder)) == CELLS
    assert CELLS <= len(measured(folder)) <= CELLS + KILLS


def test_two_at_once_on_one_folder_get_the_same_matrix(sweeper: Sweeper, whole: Path, tmp_path: Path) -> None:
    answers = [tmp_path / "one.npz", tmp_path / "other.npz"]
    for answer in answers:
        sweeper.start(tmp_path / "scores", answer)
    assert [sweeper.end(), sweeper.end()] == [0, 0]
    assert same(answers[0], answers[1])
    assert same(answers[0], whole)
    assert len(cells(tmp_path / "scores")) == CELLS


def test_the_comparison_has_teeth(whole: Path, tmp_path: Path) -> None:
    with np.load(whole) as found:
        arrays = {name: found[name] for name in found.files}
    assert np.count_nonzero(arrays["values"]) > 50
    arrays["values"][0, 0] = np.nextafter(arrays["values"][0, 0], np.inf)
    np.savez(tmp_path / "other.npz", allow_pickle=False, **arrays)
    assert not same(whole, tmp_path / "other.npz")
