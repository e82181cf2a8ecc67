"""A set of files moves in as one: stopped before every single step, either the old set or the new one is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxquant.core.errors import FileFormatError, OutputError
from fxquant.core.storage import OUTPUT, READY, RESULT, UNFINISHED, finish, staged, sweep, write_json

OLD = {"result.json": "old", "plan.json": "old", "sensitivity_pairs.npz": "old", "model.onnx": "old"}
NEW = {"result.json": "new", "plan.json": "new", "sensitivity_gram.npz": "new"}
MINE = {"mine.txt": "keep"}


def fill(folder: Path, texts: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


def found(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def replace_set(folder: Path) -> None:
    with staged(folder, OUTPUT) as place:
        fill(place, NEW)


class Killed(BaseException):
    """Stands for a kill: nothing of ours may run behind it."""


def killed_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process die, in effect, before its n-th rename or removal: everything after it fails too."""
    done = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done > step:
                raise Killed
            return original(*args, **kwargs)

        return run

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


def test_a_set_takes_the_place_of_another(tmp_path: Path) -> None:
    fill(tmp_path, {**OLD, **MINE})
    replace_set(tmp_path)
    assert found(tmp_path) == {**NEW, **MINE}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_only_the_sets_own_files_go(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    with staged(tmp_path, RESULT) as place:
        fill(place, NEW)
    assert found(tmp_path) == {**NEW, "model.onnx": "old"}


def test_stopped_before_any_step_it_is_the_old_set_or_the_new_one(tmp_path: Path) -> None:
    seen = []
    for step in range(40):
        folder = tmp_path / str(step)
        fill(folder, {**OLD, **MINE})
        with pytest.MonkeyPatch.context() as patch:
            killed_before(step, patch)
            try:
                replace_set(folder)
            except Killed:
                over = False
            else:
                over = True
        _ = finish(folder)
        sweep(folder)
        seen.append(found(folder))
        assert seen[-1] in ({**OLD, **MINE}, {**NEW, **MINE})
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        if over:
            break
    assert over
    # The old one until the point of no return, the new one from there on.
    turn = seen.index({**NEW, **MINE})
    assert 0 < turn < len(seen) - 3
    assert all(each == seen[-1] for each in seen[turn:])


def fail_in_the_middle(folder: Path) -> None:
    with staged(folder, OUTPUT) as place:
        fill(place, NEW)
        raise ZeroDivisionError


def test_a_failure_leaves_the_old_set(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    with pytest.raises(ZeroDivisionError):
        fail_in_the_middle(tmp_path)
    assert found(tmp_path) == OLD
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def full_at_a_file(folder: Path) -> None:
    with staged(folder, OUTPUT) as place, staged(place, RESULT) as inner:
        raise OutputError(f"cannot write {inner / 'ranges.npz'}: full")


def test_an_error_names_the_file_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=f"^cannot write {tmp_path / 'ranges.npz'}: full$"):
        full_at_a_file(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose a writable folder"):
        replace_set(tmp_path / "file")


def test_nothing_to_finish(tmp_path: Path) -> None:
    assert not finish(tmp_path)
    (tmp_path / READY).mkdir()
    assert finish(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "names", [["../evil"], ["mine.txt"], ["result.json", 3], None, ["a\\plan.json"], ["/plan.json"]]
)
@pytest.mark.parametrize("key", ["files", "stale"])
def test_a_list_that_no_move_left_is_refused(tmp_path: Path, names: object, key: str) -> None:
    fill(tmp_path, {**OLD, **MINE})
    lists = {"files": ["plan.json"], "stale": ["model.onnx"], key: names}
    write_json(tmp_path / READY / "files.json", "files", 1, lists)
    with pytest.raises(FileFormatError, match=r"files\.json names .*, which fxquant never moves; remove"):
        finish(tmp_path)
    assert found(tmp_path) == {**OLD, **MINE}


def test_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / READY).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileFormatError, match="is a link"):
        finish(tmp_path / "folder")


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    fill(tmp_path, MINE)
    fill(tmp_path / "scores", {"a.npz": "cell", f"{UNFINISHED}b.npz.x.npz": "half"})
    fill(tmp_path / f"{UNFINISHED}x", {"result.json": "half"})
    sweep(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "mine.txt",
        "scores",
        "scores/a.npz",
    ]
