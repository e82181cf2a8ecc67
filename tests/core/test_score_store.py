from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fxquant.core.errors import FileFormatError, OutputError
from fxquant.core.score_store import ScoreStore
from tests.core.test_store import names_in

IDENTITY = {"model": "abc", "images": "def"}


def test_cells_outlive_the_run_that_made_them(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "scores", IDENTITY)
    assert store.get("a") is None
    store.put("a", {"loss": np.arange(3.0), "mean": 0.5})
    again = ScoreStore(tmp_path / "scores", IDENTITY).get("a")
    assert again is not None
    assert again["loss"].tolist() == [0.0, 1.0, 2.0]
    assert float(again["mean"]) == 0.5
    assert names_in(tmp_path / "scores") == ["a.npz", "identity.json"]


def test_memory_alone_will_do() -> None:
    store = ScoreStore(None, IDENTITY)
    store.put("a", {"loss": 1.0})
    cell = store.get("a")
    assert cell is not None
    assert float(cell["loss"]) == 1.0
    assert ScoreStore(None, IDENTITY).get("a") is None


def test_scores_of_something_else_are_refused(tmp_path: Path) -> None:
    ScoreStore(tmp_path, IDENTITY)
    with pytest.raises(FileFormatError, match="made with another images; use another workdir"):
        ScoreStore(tmp_path, {**IDENTITY, "images": "xyz"})
    with pytest.raises(FileFormatError, match="made with another loss"):
        ScoreStore(tmp_path, {**IDENTITY, "loss": "kl"})


def test_a_cell_cut_short_is_refused(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path, IDENTITY)
    store.put("a", {"loss": np.arange(100.0)})
    path = tmp_path / "a.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FileFormatError, match=r"a\.npz is not an intact npz"):
        ScoreStore(tmp_path, IDENTITY).get("a")


def test_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose a writable folder"):
        ScoreStore(tmp_path / "file" / "scores", IDENTITY)
