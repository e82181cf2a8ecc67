from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fxquant.core.errors import OptionError, WorkerError
from fxquant.core.host import ALONE, Shards

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def test_the_place_comes_from_torchrun() -> None:
    assert Shards.from_environment({}) == ALONE
    assert Shards.from_environment({"RANK": "1"}) == ALONE
    found = Shards.from_environment({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
    assert found == Shards(3, 8, 4)
    assert not found.is_first
    assert ALONE.is_first


@pytest.mark.parametrize(
    "given", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}]
)
def test_places_that_cannot_be(given: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="torchrun"):
        Shards.from_environment(given)


def test_cores_are_divided_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert ALONE.threads == 12
    assert Shards(0, 8, 4).threads == 3
    assert Shards(0, 64, 64).threads == 1


def test_alone_nothing_is_connected() -> None:
    with ALONE.group(CPU):
        assert not dist.is_initialized()
        ALONE.agree("anything", CPU)
        assert ALONE.owners([True, False, False], CPU) == ([0, 0, 0], [False, True, True])


def test_nobody_to_connect_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    shards = Shards(0, 2)
    with pytest.raises(WorkerError, match="worker 0 of 2 lost the others while connecting"), shards.group(CPU):
        raise AssertionError("went on alone")


def test_two_processes_exchange_and_notice_when_one_leaves() -> None:
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "tests.shard_worker"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["left", "noticed"]
