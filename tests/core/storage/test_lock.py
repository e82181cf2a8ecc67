from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fxquant.core.errors import BusyFolderError, OutputError
from fxquant.core.storage import LOCK, only_writer

HOLD = """
import sys
from pathlib import Path
from fxquant.core.storage.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_at_a_time(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        told = rf"{tmp_path} is being written by another run, process {os.getpid()} on \S+; wait for it to end"
        with pytest.raises(BusyFolderError, match=told), only_writer(tmp_path):
            raise AssertionError
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_the_lock_of_a_killed_process_is_none(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BusyFolderError, match=f"process {holder.pid} on"), only_writer(tmp_path):
        raise AssertionError
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    assert (tmp_path / LOCK).exists()
    with only_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, calls = fcntl.flock, []

    def removed(handle: int, kind: int) -> None:
        flock(handle, kind)
        calls.append(handle)
        if len(calls) == 1:
            # Its holder ended between our opening the file and our locking it.
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", removed)
    with only_writer(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / LOCK).exists()


def test_a_holder_that_has_not_said_who_it_is(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        (tmp_path / LOCK).write_text("")
        with pytest.raises(BusyFolderError, match="another run, which has just started"), only_writer(tmp_path):
            raise AssertionError


def test_where_there_are_no_locks_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with only_writer(tmp_path):
        pass
    assert "cannot be locked" in caplog.text
    assert "do not start two runs on this folder" in caplog.text


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"), only_writer(tmp_path / "nowhere"):
        raise AssertionError
