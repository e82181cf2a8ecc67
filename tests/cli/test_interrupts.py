from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fxquant.cli import stopped_in_order

ROOT = Path(__file__).parents[2]

STUCK = """
import os, signal
from fxquant.cli.interrupts import stopped_in_order

def twice(number, terminate):
    with stopped_in_order(terminate):
        try:
            os.kill(os.getpid(), number)
            print("never")
        except KeyboardInterrupt:
            print("stopped", flush=True)
            os.kill(os.getpid(), number)
            print("goes on", flush=True)

twice(signal.SIGTERM, True)
twice(signal.SIGINT, False)
"""


def interrupted() -> None:
    with stopped_in_order():
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError


def test_the_first_one_raises_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigterm_is_ignored_and_the_second_ctrl_c_ends_the_process() -> None:
    command = [sys.executable, "-W", "ignore", "-c", STUCK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["stopped", "goes", "on", "stopped"]
    assert done.returncode == -signal.SIGINT


def test_other_threads_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with stopped_in_order(terminate=True):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
