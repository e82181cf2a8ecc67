"""`torchrun -m fxquant analyze`: a worker dies, the next run goes on, and the matrices are those of one process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fxquant
from fxquant.cli import main
from fxquant.core.facts import Surrogates
from tests.small import images, small

ROOT = Path(__file__).parent.parent
WIDTHS = ["--bits", "2,3,4,8", "--target", "reference", "--estimators", "pairs,gram"]


def arguments(place: Path, output: str, calibration: str) -> list[str]:
    model = place / "net.pt2"
    return ["analyze", "--model", str(model), "--calibration", calibration, "--output", str(place / output), *WIDTHS]


def torchrun(*command: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "-m", "fxquant", *command],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def worker(parent: int, rank: int) -> int:
    """Return the process number of a worker, by its parent and the rank in its environment."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            own = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent
            if own and f"RANK={rank}" in (entry / "environ").read_text().split("\0"):
                return int(entry.name)
        except OSError:
            continue  # ended while we looked
    raise AssertionError(f"{parent} has no worker {rank}")


@pytest.mark.slow
def test_a_worker_dies_and_the_next_run_goes_on(tmp_path: Path) -> None:
    x = images()
    exported = torch.export.export(small(), (x[:2],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(exported, tmp_path / "net.pt2")
    np.savez(tmp_path / "images.npz", allow_pickle=False, x=x.numpy())
    scores = tmp_path / "two" / "scores"
    command = arguments(tmp_path, "two", "tests.slow:images")

    running = torchrun(*command)
    deadline = time.monotonic() + 120
    while len(list(scores.glob("[!.]*.npz"))) < 3:
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(worker(running.pid, 1), signal.SIGKILL)
    printed = running.communicate(timeout=60)[0]
    assert running.returncode != 0
    assert "Signal 9 (SIGKILL)" in printed
    # The other process hears of it from the group or from torchrun, whichever is quicker.
    assert re.search(r"finished (scores|parts) are kept", printed), printed
    assert not (tmp_path / "two" / "result.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in scores.glob("[!.]*.npz")}
    assert len(finished) >= 3

    resumed = torchrun(*arguments(tmp_path, "two", "tests.small:images"), "--resume")
    printed = resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0, printed
    assert printed.count("candidates") == 1, "one process speaks"
    assert f"{len(finished) - 1} already finished" in printed
    assert {name: (scores / name).stat().st_mtime_ns for name in finished} == finished

    assert main([*arguments(tmp_path, "one", str(tmp_path / "images.npz")), "--quiet"]) == 0
    one, two = fxquant.load(tmp_path / "one"), fxquant.load(tmp_path / "two")
    matrices = [result.program[Surrogates].matrices for result in (one, two)]
    assert set(matrices[0]) == set(matrices[1]) == {"pairs", "gram"}
    for name, matrix in matrices[0].items():
        assert np.count_nonzero(matrix.values) > len(matrix.candidates)
        np.testing.assert_allclose(matrices[1][name].values, matrix.values, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(matrices[1][name].stderr, matrix.stderr, rtol=1e-4, atol=1e-9)
