from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from fxquant.core.errors import OutputError
from fxquant.core.storage import UNFINISHED, atomic_path, check_writable, unwritable, work_folder


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"No space left on device after 70 bytes, \d+ bytes are free there; free some space"),
        (errno.EDQUOT, r"Disk quota exceeded after 70 bytes, \d+ bytes are free there; your quota is used up"),
        (errno.EFBIG, r"File too large after 70 bytes.*; files there may not be that large"),
        (errno.EROFS, r"Read-only file system; choose a writable folder"),
        (errno.EACCES, r"Permission denied; choose a writable folder"),
    ],
)
def test_the_error_says_how_far_it_came_and_what_to_do(tmp_path: Path, number: int, message: str) -> None:
    path = tmp_path / "not" / "there" / "a.npz"
    with pytest.raises(OutputError, match=f"cannot write {path}: {message}"):
        raise unwritable(path, OSError(number, os.strerror(number)), 70)


def half_written(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(bytes(1234))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_bytes_written_so_far_are_those_of_the_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OutputError, match=r"No space left on device after 1234 bytes"):
        half_written(tmp_path / "a")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize("durable", [True, False])
def test_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    flushed: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: flushed.append((tmp_path / "a").exists()))
    with atomic_path(tmp_path / "a", durable) as temporary:
        temporary.write_text("x")
    assert flushed == ([False] if durable else [])
    assert (tmp_path / "a").read_text() == "x"


def test_a_disk_that_fills_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_tried_and_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose a writable folder"):
        check_writable(tmp_path / "file")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(OutputError, match=f"cannot write {tmp_path}: Read-only file system; choose a writable folder"):
        check_writable(tmp_path)


def test_a_workdir_is_tried_before_the_work(tmp_path: Path) -> None:
    assert work_folder(None, "scores") is None
    assert work_folder(str(tmp_path / "w"), "scores") == tmp_path / "w" / "scores"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        work_folder(tmp_path / "file", "scores")


def test_what_is_unfinished_is_called_so(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.npz") as temporary:
        assert temporary.name.startswith(f"{UNFINISHED}a.npz.")
        assert temporary.suffix == ".npz"
