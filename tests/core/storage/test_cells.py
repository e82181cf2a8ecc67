from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fxquant.core.errors import FileFormatError, OutputError
from fxquant.core.storage import ScoreStore, write_arrays, write_json

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
    with pytest.raises(FileFormatError, match="another calibration;"):
        ScoreStore(tmp_path, {**IDENTITY, "calibration": "c"})
    with pytest.raises(FileFormatError, match="another data;"):
        ScoreStore(tmp_path, {name: value for name, value in IDENTITY.items() if name != "data"})


def test_a_damaged_header(tmp_path: Path) -> None:
    ScoreStore(tmp_path, IDENTITY)
    (tmp_path / "identity.json").write_text('{"kind": "sco')
    with pytest.raises(FileFormatError, match=r"not valid JSON.*use another workdir, or remove"):
        ScoreStore(tmp_path, IDENTITY)


def test_scores_of_an_older_version(tmp_path: Path) -> None:
    write_json(tmp_path / "identity.json", "scores", 1, IDENTITY)
    write_arrays(tmp_path / "a.npz", {"losses": np.ones(2)})
    with pytest.raises(FileFormatError, match=r"version 1, this fxquant reads 2.*use another workdir, or remove"):
        ScoreStore(tmp_path, IDENTITY)


def test_a_damaged_cell_is_measured_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ScoreStore(tmp_path, IDENTITY).put("a", CELL)
    path = tmp_path / "a.npz"
    whole = path.read_bytes()
    at = whole.index(np.float64(1.5).tobytes())
    path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    store = ScoreStore(tmp_path, IDENTITY)
    assert store.get("a") is None
    assert "damaged score is measured again" in caplog.text
    assert str(path) in caplog.text
    store.put("a", CELL)
    found = ScoreStore(tmp_path, IDENTITY).get("a")
    assert found is not None
    assert np.array_equal(found["losses"], [[1.5, -2.0]])


def test_cells_of_something_else_are_refused_without_a_header(tmp_path: Path) -> None:
    ScoreStore(tmp_path, IDENTITY).put("a", CELL)
    (tmp_path / "identity.json").unlink()
    with pytest.raises(FileFormatError, match=r"a\.npz was made with another .*identity\.json.* is missing"):
        ScoreStore(tmp_path, {**IDENTITY, "model": "m2"})
    # Refusing leaves no header behind that would claim the cells.
    assert not (tmp_path / "identity.json").exists()
    assert ScoreStore(tmp_path, IDENTITY).get("a") is not None


def test_a_foreign_cell_beside_our_header_is_refused(tmp_path: Path) -> None:
    ScoreStore(tmp_path / "other", {**IDENTITY, "data": "d2"}).put("a", CELL)
    store = ScoreStore(tmp_path / "own", IDENTITY)
    (tmp_path / "other" / "a.npz").replace(tmp_path / "own" / "a.npz")
    with pytest.raises(FileFormatError, match=r"a\.npz was made with another model, data or settings"):
        store.get("a")
    write_arrays(tmp_path / "own" / "b.npz", {"losses": np.ones(2)})
    with pytest.raises(FileFormatError, match=r"b\.npz was made with another"):
        store.get("b")


def test_of_two_first_ones_both_go_by_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The other process writes its header after this one looked and found none.
    refuse = ScoreStore._refuse_strangers

    def other_first(self: ScoreStore, folder: Path) -> None:
        refuse(self, folder)
        monkeypatch.setattr(ScoreStore, "_refuse_strangers", refuse)
        ScoreStore(folder, {**IDENTITY, "model": "winner"})

    monkeypatch.setattr(ScoreStore, "_refuse_strangers", other_first)
    with pytest.raises(FileFormatError, match="another model;"):
        ScoreStore(tmp_path, IDENTITY)
    assert ScoreStore(tmp_path, {**IDENTITY, "model": "winner"}).get("a") is None
    assert [path.name for path in tmp_path.iterdir()] == ["identity.json"]


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
