from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from fxquant.core.errors import BusyFolderError, OutputError
from fxquant.core.storage import HOLDER, LOCK, only_writer

HOLD = """
import sys
from pathlib import Path
from fxquant.core.storage import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def refused(folder: Path, message: str) -> None:
    with pytest.raises(BusyFolderError, match=message), only_writer(folder):
        raise AssertionError


def test_one_at_a_time(tmp_path: Path) -> None:
    message = rf"{tmp_path} is being written by another run, process {os.getpid()} on \S+; wait for it to end"
    with only_writer(tmp_path):
        refused(tmp_path, message)
        other = Thread(target=refused, args=(tmp_path, message))
        other.start()
        other.join()
        # Refusals leave the holder's name as it was.
        refused(tmp_path, message)
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, HOLDER]


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused(tmp_path, f"process {holder.pid} on")
        holder.send_signal(signal.SIGKILL)
    assert {LOCK, HOLDER} <= {path.name for path in tmp_path.iterdir()}
    with only_writer(tmp_path):
        refused(tmp_path, f"process {os.getpid()} on")
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
        assert len(calls) >= 2
        assert (tmp_path / LOCK).exists()
        refused(tmp_path, f"process {os.getpid()} on")


def test_a_holder_that_has_not_written_its_name(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        (tmp_path / HOLDER).write_text("")
        refused(tmp_path, "another run, which has just started")


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


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), only_writer(tmp_path / "file"):
        raise AssertionError
