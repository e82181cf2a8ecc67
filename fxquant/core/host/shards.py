"""Share a sweep among the processes that `torchrun` started: which process measures what, and how the others get it.

Cells are assigned in turn, and exchanged in rounds of one cell per process. So a process waits for another no longer
than one cell takes (a dead one shows within the timeout, and usually at once: its connection closes), and whatever is
finished lies with every process that keeps a folder, shared or not. Only bytes of npz files travel, never pickles.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fxquant.core.errors import OptionError, WorkerError, first_line

TIMEOUT = timedelta(minutes=30)
"""Longest that one process waits for the cell of another."""


@dataclass(frozen=True)
class Shards:
    """The place of this process among those that share a sweep.

    Args:
        rank: number of this process, 0 for the one that writes results.
        world_size: number of processes.
        local_size: number of them on this machine.

    Raises:
        OptionError: a number out of range.
    """

    rank: int = 0
    world_size: int = 1
    local_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size or self.local_size < 1:
            raise OptionError(
                f"rank {self.rank} of {self.world_size} processes ({self.local_size} here) is impossible; use torchrun"
            )

    @staticmethod
    def from_environment(environment: Mapping[str, str] | None = None) -> Shards:
        """Return what torchrun's variables say, one process where there are none.

        Args:
            environment: RANK, WORLD_SIZE, LOCAL_WORLD_SIZE; None takes the process's own.

        Raises:
            OptionError: they are no whole numbers, or out of range.
        """
        known = os.environ if environment is None else environment
        if "RANK" not in known or "WORLD_SIZE" not in known:
            return ALONE
        try:
            return Shards(int(known["RANK"]), int(known["WORLD_SIZE"]), int(known.get("LOCAL_WORLD_SIZE", "1")))
        except ValueError as error:
            raise OptionError(
                f"RANK={known['RANK']!r}, WORLD_SIZE={known['WORLD_SIZE']!r} are no whole numbers; start with torchrun"
            ) from error

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes results."""
        return self.rank == 0

    @property
    def threads(self) -> int:
        """Threads of this process: the machine's cores divided by its processes, at least 1."""
        # Only Linux tells which cores a process may use.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // self.local_size)

    @contextmanager
    def group(self, device: torch.device) -> Iterator[None]:
        """Connect the processes, over nccl for CUDA and gloo otherwise; nothing happens where there is one.

        Args:
            device: where the tensors of the sweep live.

        Raises:
            WorkerError: not all of them came, or one was lost on the way.
        """
        if self.world_size == 1:
            yield
            return
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":
            # torchrun sets 1 by default, whatever the machine has; a number that the user set stays.
            torch.set_num_threads(self.threads)
        ours = not dist.is_initialized()
        if ours:
            with self._named("connecting"):
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        try:
            yield
        finally:
            if ours:
                dist.destroy_process_group()

    def agree(self, text: str, device: torch.device) -> None:
        """Check that all processes work on the same thing.

        Args:
            text: a digest of it, of the same length everywhere.
            device: where the tensors of the sweep live.

        Raises:
            WorkerError: they do not, or one was lost.
        """
        others = self._gather(torch.tensor(list(text.encode()), dtype=torch.uint8, device=device), "comparing work")
        differ = [rank for rank, other in enumerate(others) if bytes(other.tolist()) != text.encode()]
        if differ:
            raise WorkerError(
                f"worker {self.rank} and worker {', '.join(map(str, differ))} of {self.world_size} were given another "
                "model, data or settings, or another fxquant; give all of them the same"
            )

    def owners(self, have: Sequence[bool], device: torch.device) -> tuple[list[int], list[bool]]:
        """Return for each cell the process that provides it, and whether some process still lacks it.

        Args:
            have: which cells this process has. One that any process has is provided by the first of those, the others
                are dealt out in turn.
            device: where the tensors of the sweep live.

        Raises:
            WorkerError: a process was lost.
        """
        tables = self._gather(torch.tensor(have, dtype=torch.uint8, device=device), "counting finished scores")
        held = torch.stack([table.cpu() for table in tables]).bool()
        owners, missing = [], 0
        for column in held.T.tolist():
            if any(column):
                owners.append(column.index(True))
            else:
                owners.append(missing % self.world_size)
                missing += 1
        return owners, (~held.all(dim=0)).tolist()

    def broadcast(self, owner: int, packed: bytes | None, device: torch.device) -> bytes:
        """Return the owner's bytes.

        Args:
            owner: rank of the process that has them.
            packed: the bytes, at least one, where this process is the owner; None elsewhere.
            device: where the tensors of the sweep live.

        Raises:
            WorkerError: a process was lost.
        """
        size = torch.tensor([len(packed or b"")], dtype=torch.int64, device=device)
        with self._named("exchanging scores"):
            dist.broadcast(size, owner)
        if packed is None:
            buffer = torch.empty(int(size), dtype=torch.uint8, device=device)
        else:
            buffer = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(device)
        with self._named("exchanging scores"):
            dist.broadcast(buffer, owner)
        return buffer.cpu().numpy().tobytes() if packed is None else packed

    def _gather(self, mine: torch.Tensor, doing: str) -> list[torch.Tensor]:
        if self.world_size == 1:
            return [mine]
        others = [torch.empty_like(mine) for _ in range(self.world_size)]
        with self._named(doing):
            dist.all_gather(others, mine)
        return others

    @contextmanager
    def _named(self, doing: str) -> Iterator[None]:
        """Turn torch's errors about lost connections into WorkerError."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            # dist.DistBackendError and DistNetworkError are RuntimeErrors; a bad address is a ValueError.
            why = first_line(error)
            raise WorkerError(
                f"worker {self.rank} of {self.world_size} lost the others while {doing} ({why}); see what the first of "
                "them to stop said; finished scores are kept in the workdir, run again on it (command line: --resume) "
                "to go on"
            ) from error


ALONE = Shards()
"""One process that does everything."""
