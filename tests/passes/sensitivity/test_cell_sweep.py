from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant.core.host import ALONE, SILENT, Shards
from fxquant.core.storage import ScoreStore, pack_arrays, text_digest
from fxquant.passes.sensitivity import Cell, Memory, Work, sweep

CPU = torch.device("cpu")
KEYS = ("a", "b", "c", "d", "e")


class Two(Shards):
    """This process among two, the other one made up: it has what it is said to have, and measures its share."""

    other_has: frozenset[str] = frozenset()
    sent: tuple[str, ...] = ()

    def agree(self, text: str, device: torch.device) -> None:
        """Note what is compared."""
        assert device == CPU
        compared.append(text)

    def owners(self, have: Sequence[bool], device: torch.device) -> tuple[list[int], list[bool]]:
        """Deal out what neither has."""
        assert device == CPU
        theirs = [key in self.other_has for key in KEYS]
        tables = [have, theirs] if self.rank == 0 else [theirs, have]
        owners, missing = [], 0
        for column in zip(*tables, strict=True):
            owners.append(column.index(True) if any(column) else missing % 2)
            missing += not any(column)
        return owners, [not all(column) for column in zip(*tables, strict=True)]

    def broadcast(self, owner: int, packed: bytes | None, device: torch.device) -> bytes:
        """Take this process's bytes, or give what the other would send."""
        assert device == CPU
        log.append((owner, packed is not None))
        assert (packed is not None) == (owner == self.rank)
        return packed if packed is not None else pack_arrays({"x": np.array(next(incoming))})


log: list[tuple[int, bool]] = []
compared: list[str] = []
incoming: Iterator[float] = iter(())


def work(done: list[str]) -> Work:
    def cell(key: str, value: float) -> Cell:
        done.append(key)
        return {"x": value}

    return {key: lambda key=key, value=value: cell(key, value) for value, key in enumerate(KEYS)}  # type: ignore[misc]


def test_alone_only_what_is_missing_is_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []
    ScoreStore(tmp_path, {"m": "1"}).put("c", {"x": 7.0})
    store = ScoreStore(tmp_path, {"m": "1"})
    with caplog.at_level(logging.INFO):
        found = sweep("stage", work(done), store, ALONE, SILENT, CPU)
    assert "stage: 5 cells, 1 already finished" in caplog.text
    assert done == ["a", "b", "d", "e"]
    assert list(found) == list(KEYS)
    assert [float(cell["x"]) for cell in found.values()] == [0, 1, 7, 3, 4]


def test_what_this_run_measured_is_not_told_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, done = ScoreStore(tmp_path, {"m": "1"}), list[str]()
    store.put("a", {"x": 0.0})
    with caplog.at_level(logging.INFO):
        sweep("first", work(done), store, ALONE, SILENT, CPU)
        sweep("second", work(done), store, ALONE, SILENT, CPU)
        sweep("next run", work(done), ScoreStore(tmp_path, {"m": "1"}), ALONE, SILENT, CPU)
    assert [text for text in caplog.messages if "cells" in text] == [
        "first: 5 cells, 0 already finished",
        "next run: 5 cells, 5 already finished",
    ]


def test_of_two_each_measures_its_share_and_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    store = ScoreStore(tmp_path, {"m": "1"})
    store.put("a", {"x": 0.0})
    monkeypatch.setattr(Two, "other_has", frozenset("d"))
    # Left are b, c, e: the first and the third are ours; a is given away, c and d come from the other.
    log.clear()
    compared.clear()
    monkeypatch.setitem(globals(), "incoming", iter([20.0, 30.0]))
    found = sweep("stage", work(done), store, Two(0, 2), SILENT, CPU)
    assert done == ["b", "e"]
    assert [float(cell["x"]) for cell in found.values()] == [0, 1, 20, 30, 4]
    assert compared == [text_digest("a\nb\nc\nd\ne")]
    assert log == [(0, True), (0, True), (1, False), (1, False), (0, True)]
    # What came from the other is kept here, too: the folders need not be one.
    again = ScoreStore(tmp_path, {"m": "1"})
    assert [again.get(key) is not None for key in KEYS] == [True] * 5


def test_a_cell_is_kept_before_it_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> bytes:
        raise ConnectionError

    monkeypatch.setattr(Two, "broadcast", lost)
    with pytest.raises(ConnectionError):
        sweep("stage", work([]), ScoreStore(tmp_path, {"m": "1"}), Two(1, 2), SILENT, CPU)
    assert [path.stem for path in tmp_path.glob("*.npz")] == ["b"]


def test_memory_as_a_line() -> None:
    memory = Memory(16, 2_000_000, 500_000, 3_000_000, True)
    assert memory.total == 7_500_000
    assert memory.text() == (
        "batch size 16; memory: 2.0 MB of kept activations, the rest recomputed when read (twice for pairs), "
        "0.5 MB while running, 3.0 MB for all pairs' losses"
    )
    assert "recomputed" not in Memory(16, 1, 1, 1, False).text()
