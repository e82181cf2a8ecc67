"""Runs that are killed, and runs at the same time: real processes on one folder of scores."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
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

    def start(self, folder: Path, answer: Path) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder} {answer}\n")
        self.process.stdin.flush()
        return int(self.line())

    def end(self) -> int:
        """Return the status of the child that ends next."""
        return int(self.line().split()[1])

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
def whole(sweeper: Sweeper, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The matrix of a run that nothing stopped, and the seconds it took."""
    place = tmp_path_factory.mktemp("whole")
    start = time.monotonic()
    sweeper.start(place / "scores", place / "answer.npz")
    assert sweeper.end() == 0
    assert len(measured(place / "scores")) == len(cells(place / "scores")) == CELLS
    return place / "answer.npz", time.monotonic() - start


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
    sweeper: Sweeper, whole: tuple[Path, float], tmp_path: Path
) -> None:
    reference, seconds = whole
    folder, answer = tmp_path / "scores", tmp_path / "answer.npz"
    chance, died = random.Random(), 0
    for _ in range(KILLS):
        before = len(measured(folder))
        kept = cells(folder)
        number = sweeper.start(folder, answer)
        time.sleep(chance.uniform(0.1, 0.4) * seconds)
        # A run that goes on near its end may be over before the kill; its last line is read all the same.
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
        died += sweeper.end() == signal.SIGKILL
        # All that was measured is there, but for one cell that may not have been written yet.
        assert kept <= cells(folder)
        assert len(cells(folder)) >= len(kept) + len(measured(folder)) - before - 1
    assert died, "every run was over before its kill: make the sweep longer"
    sweeper.start(folder, answer)
    assert sweeper.end() == 0
    assert same(answer, reference)
    assert len(cells(folder)) == CELLS
    assert CELLS <= len(measured(folder)) <= CELLS + KILLS


def test_two_at_once_on_one_folder_get_the_same_matrix(
    sweeper: Sweeper, whole: tuple[Path, float], tmp_path: Path
) -> None:
    answers = [tmp_path / "one.npz", tmp_path / "other.npz"]
    for answer in answers:
        sweeper.start(tmp_path / "scores", answer)
    assert [sweeper.end(), sweeper.end()] == [0, 0]
    assert same(answers[0], answers[1])
    assert same(answers[0], whole[0])
    assert len(cells(tmp_path / "scores")) == CELLS


def test_the_comparison_has_teeth(whole: tuple[Path, float], tmp_path: Path) -> None:
    with np.load(whole[0]) as found:
        arrays = {name: found[name] for name in found.files}
    assert np.count_nonzero(arrays["values"]) > 50
    arrays["values"][0, 0] = np.nextafter(arrays["values"][0, 0], np.inf)
    np.savez(tmp_path / "other.npz", allow_pickle=False, **arrays)
    assert not same(whole[0], tmp_path / "other.npz")
