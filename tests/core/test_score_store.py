from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fxquant.core.errors import FileFormatError, OutputError
from fxquant.core.score_store import ScoreStore

IDENTITY = {"model": "m1", "data": "d1", "settings": "s1"}
CELL: dict[str, NDArray[np.float64] | float] = {"losses": np.array([[1.5, -2.0]]), "evaluations": 3.25}


def test_memory_only() -> None:
    store = ScoreStore(None, {})
    assert store.get("a") is None
    kept = store.put("a", CELL)
    assert float(kept["evaluations"]) == 3.25
    assert store.get("a") is kept


def test_a_cell_reads_back_bit_for_bit_in_another_store(tmp_path: Path) -> None:
    ScoreStore(tmp_path / "deep" / "scores", IDENTITY).put("pairs-0-3", CELL)
    found = ScoreStore(tmp_path / "deep" / "scores", IDENTITY).get("pairs-0-3")
    assert found is not None
    assert sorted(found) == ["evaluations", "losses"]
    assert np.array_equal(found["losses"], [[1.5, -2.0]])
    assert float(found["evaluations"]) == 3.25
    assert ScoreStore(tmp_path / "deep" / "scores", IDENTITY).get("pairs-0-4") is None


@pytest.mark.parametrize("field", list(IDENTITY))
def test_scores_of_something_else_are_refused_by_name(tmp_path: Path, field: str) -> None:
    ScoreStore(tmp_path, IDENTITY)
    others = [name for name in IDENTITY if name != field]
    with pytest.raises(FileFormatError, match=f"made with another {field}; use another workdir") as error:
        ScoreStore(tmp_path, {**IDENTITY, field: "changed"})
    assert not any(other in str(error.value).split("another ")[1] for other in others)


def test_every_field_that_differs_is_named(tmp_path: Path) -> None:
    ScoreStore(tmp_path, IDENTITY)
    with pytest.raises(FileFormatError, match="another model, data;"):
        ScoreStore(tmp_path, {**IDENTITY, "model": "x", "data": "y"})


def test_a_field_an_older_version_did_not_know_is_refused(tmp_path: Path) -> None:
    ScoreStore(tmp_path, IDENTITY)
    with pytest.raises(FileFormatError, match="another calibration"):
        ScoreStore(tmp_path, {**IDENTITY, "calibration": "c"})


def test_a_damaged_header(tmp_path: Path) -> None:
    ScoreStore(tmp_path, IDENTITY)
    (tmp_path / "identity.json").write_text('{"kind": "sco')
    with pytest.raises(FileFormatError, match="not valid JSON"):
        ScoreStore(tmp_path, IDENTITY)


def test_a_damaged_cell(tmp_path: Path) -> None:
    ScoreStore(tmp_path, IDENTITY).put("a", CELL)
    path = tmp_path / "a.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FileFormatError, match=r"a\.npz is not an intact npz"):
        ScoreStore(tmp_path, IDENTITY).get("a")


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ScoreStore(tmp_path, IDENTITY)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        store.put("a", CELL)
    assert [path.name for path in tmp_path.iterdir()] == ["identity.json"]
    assert ScoreStore(tmp_path, IDENTITY).get("a") is None


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "scores").write_text("")
    with pytest.raises(OutputError, match="choose a writable folder"):
        ScoreStore(tmp_path / "scores", IDENTITY)
