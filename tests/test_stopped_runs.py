"""Runs of `fxquant.quantize` that are stopped go on where they were; folders of other runs are refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from numpy.typing import NDArray

from fxquant import Result
from fxquant.core.errors import FileFormatError
from fxquant.core.host import Reporter
from fxquant.core.storage import ScoreStore
from fxquant.passes.sensitivity import Scorer
from tests.scoring import plain_net
from tests.small_runs import IMAGES, quantize, same


@cache
def best() -> tuple[Result, int]:
    """Return the result of the most thorough run, and how often it ran the scorer."""
    with patch.object(Scorer, "run", autospec=True, side_effect=Scorer.run) as run:
        return quantize(effort="best", seed=2), run.call_count


class KilledError(Exception):
    """Stands for a process that is killed."""


@pytest.mark.parametrize("cells", [1, 7])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    put = ScoreStore.put

    def fragile(self: ScoreStore, key: str, cell: Any) -> dict[str, NDArray[Any]]:
        if len(list(tmp_path.rglob("*.npz"))) == cells:
            raise KilledError
        return put(self, key, cell)

    whole, spent = best()
    with patch.object(Scorer, "run", autospec=True, side_effect=Scorer.run) as run:
        monkeypatch.setattr(ScoreStore, "put", fragile)
        with pytest.raises(KilledError):
            quantize(effort="best", seed=2, workdir=tmp_path)
        monkeypatch.setattr(ScoreStore, "put", put)
        done = run.call_count
        assert same(whole, quantize(effort="best", seed=2, workdir=tmp_path))
        assert 0 < run.call_count - done < spent
        assert done > 0
        known = run.call_count
        assert known <= spent + 20
        assert same(whole, quantize(effort="best", seed=2, workdir=tmp_path))
        assert run.call_count == known


def test_a_run_stopped_between_batches_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track = Reporter.track

    def interrupted(self: Reporter, items: Any, title: str, total: int) -> Iterator[Any]:
        for count, item in enumerate(track(self, items, title, total)):
            if title == "score pairs of choices" and count == 4:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(Reporter, "track", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(effort="best", seed=2, workdir=tmp_path)
    monkeypatch.setattr(Reporter, "track", track)
    # The progress of a cell is shown once it is on disk.
    assert len(list(tmp_path.rglob("*pairs-*.npz"))) == 5
    assert same(best()[0], quantize(effort="best", seed=2, workdir=tmp_path))


def test_a_workdir_of_another_run_is_refused(tmp_path: Path) -> None:
    quantize(effort="fast", workdir=tmp_path)
    other = plain_net()
    with torch.no_grad():
        other.fc.bias.add_(1e-3)
    for change, field in (
        ({"model": other}, "model"),
        ({"calibration": IMAGES[:20]}, "data"),
        ({"seed": 7}, "data"),
        ({"bits": (4, 8)}, "settings"),
    ):
        with pytest.raises(FileFormatError, match=f"were made with another [a-z, ]*{field}.*use another workdir"):
            quantize(effort="fast", workdir=tmp_path, **change)
