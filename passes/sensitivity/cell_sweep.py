"""Measure the cells that a store lacks, shared out among the processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxquant.core.host import Reporter, Shards
from fxquant.core.storage import Arrays, ScoreStore, pack_arrays, text_digest, unpack_arrays

Cell = Mapping[str, NDArray[Any] | float]

Work = Mapping[str, Callable[[], Cell]]
"""Key -> measures the cell; the same keys in the same order in every process."""


@dataclass(frozen=True)
class Gathered:
    """The cells of all batches, images on the last axis of arrays that have one."""

    cells: list[Arrays]

    def joined(self, name: str) -> NDArray[np.float64]:
        """Return an array of all batches, along the images."""
        return np.concatenate([cell[name] for cell in self.cells], axis=-1)

    def total(self, name: str) -> NDArray[np.float64]:
        """Return the sum of an array over the batches."""
        return np.asarray(np.sum([cell[name] for cell in self.cells], axis=0), dtype=np.float64)

    @property
    def evaluations(self) -> float:
        """Whole-network passes over one image spent."""
        return float(sum(float(cell["evaluations"]) for cell in self.cells))


@dataclass(frozen=True)
class Memory:
    """Memory that scoring takes, in bytes.

    Args:
        batch: images in a batch.
        activations: intermediate values kept for one batch; a sweep of pairs keeps two such sets.
        working: most that a run of the batch holds at once in addition.
        joint: losses of all pairs on all images, float64 of shape (columns, columns, images); for pairs only.
        recomputes: some values are not kept, and computed again when they are read.
    """

    batch: int
    activations: int
    working: int
    joint: int
    recomputes: bool

    @property
    def total(self) -> int:
        """Bytes of a sweep of pairs: `2 activations + working + joint`."""
        return 2 * self.activations + self.working + self.joint

    def text(self) -> str:
        """Return one readable line, in MB of 10^6 bytes."""
        kept, working, joint = (f"{size / 1e6:.1f} MB" for size in (self.activations, self.working, self.joint))
        again = ", the rest recomputed when read" if self.recomputes else ""
        return (
            f"batch size {self.batch}; memory: {kept} of kept activations{again} (twice for pairs), "
            f"{working} while running, {joint} for all pairs' losses"
        )


def sweep(
    title: str, work: Work, store: ScoreStore, shards: Shards, reporter: Reporter, device: torch.device
) -> dict[str, Arrays]:
    """Return all cells by key, each measured by one process and sent to the others.

    Args:
        title: shown with the progress.
        work: what to measure.
        store: finished cells; new ones are put there as they finish.
        shards: this process among those that share the work.
        reporter: shows progress.
        device: where the tensors of the sweep live.

    Raises:
        WorkerError: another process was lost, or has another list of cells.
    """
    keys = list(work)
    # The keys may depend on earlier measurements, which unlike machines could round to unlike lists.
    shards.agree(text_digest("\n".join(keys)), device)
    have = [store.get(key) is not None for key in keys]
    found = sum(held and key not in store.added for key, held in zip(keys, have, strict=True))
    # What another estimator of this run measured, or the estimate of its time, was shown then.
    if found or not all(have):
        reporter.say(f"{title}: {len(keys)} cells, {found} already finished")
    owners, wanted = shards.owners(have, device)
    new = [key for key, held, lacking in zip(keys, have, wanted, strict=True) if lacking or not held]
    providers = dict(zip(keys, owners, strict=True))
    bar = reporter.track(new, title, len(new))
    # One cell for each process in a round: none waits longer for another than a cell takes.
    for start in range(0, len(new), shards.world_size):
        turn = new[start : start + shards.world_size]
        for key in turn:
            if providers[key] == shards.rank and store.get(key) is None:
                store.put(key, work[key]())
        for key in turn:
            _ = next(bar)
            if shards.world_size > 1:
                _send(key, providers[key], store, shards, device)
    _ = list(bar)
    return {key: cell for key in keys if (cell := store.get(key)) is not None}


def _send(key: str, owner: int, store: ScoreStore, shards: Shards, device: torch.device) -> None:
    measured = store.get(key) if owner == shards.rank else None
    packed = shards.broadcast(owner, None if measured is None else pack_arrays(measured), device)
    # Where processes have folders of their own, each keeps every cell, so that a later run can resume from any of them.
    if measured is None and store.get(key) is None:
        store.put(key, unpack_arrays(packed))
