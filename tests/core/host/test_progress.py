from __future__ import annotations

import io
import logging
import re
import sys
import threading
from collections.abc import Iterator

import pytest

from fxquant.core.host import SILENT, Reporter, seconds_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_title_and_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(Reporter().track(iter("abc"), "measure", 3)) == ["a", "b", "c"]
    assert "measure" in screen.getvalue()
    assert "3/3" in screen.getvalue()


class Clock:
    """Stands still but for what each item takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("fxquant.core.host.progress.time.monotonic", lambda: self.now)

    def working(self, count: int, seconds: float) -> Iterator[int]:
        for item in range(count):
            self.now += seconds
            yield item


def test_silence_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Reporter(False).track([1, 2], "measure", 2)) == [1, 2]
    assert list(SILENT.track([], "measure", 0)) == []
    assert capsys.readouterr() == ("", "")


def test_no_terminal_gets_one_line_per_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, reporter = Clock(monkeypatch), Reporter()
    assert list(reporter.track(clock.working(120, 0.1), "scored single choices", 120)) == list(range(120))
    reporter.say("one [x] cell")
    assert list(reporter.track([], "nothing to do", 0)) == []
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "scored single choices: 120 of 120 in 12 s\none [x] cell\n"


def test_a_long_stage_says_every_half_minute_how_long_it_will_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    _ = list(Reporter().track(clock.working(100, 1.0), "measure", 100))
    first, *between, last = capsys.readouterr().err.splitlines()
    assert first == "measure: 30 of 100 after 30 s, about 1 min 10 s left"
    assert len(between) == 2
    assert last == "measure: 100 of 100 in 1 min 40 s"


def test_work_done_before_an_item_is_asked_for_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    stage = Reporter().track(["cell"], "measure", 1)
    clock.now += 20
    assert list(stage) == ["cell"]
    assert capsys.readouterr().err == "measure: 1 of 1 in 20 s\n"


def test_stages_are_numbered_and_long_silence_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, reporter = Clock(monkeypatch), Reporter()

    class Waiting(threading.Event):
        """Is asked every 3 seconds, of 100."""

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            clock.now += timeout
            return clock.now > 200

    with reporter.stages(("capture", "score")):
        reporter.stage("capture")
        reporter.stage("unheard of")
        reporter.stage("score")
        reporter._watch(Waiting())
    reporter.stage("score")
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["1 of 2: capture", "2 of 2: score"]
    assert said[2:] == [f"2 of 2: score, {text} so far" for text in ("30 s", "1 min 00 s", "1 min 30 s")]
    assert not [thread for thread in threading.enumerate() if "_watch" in thread.name]


def test_a_block_of_stages_ends_with_its_watcher_and_says_nothing_in_silence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = threading.active_count()

    def failing() -> None:
        with Reporter().stages(("capture",)):
            assert threading.active_count() == before + 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    with Reporter(False).stages(("capture",)):
        SILENT.stage("capture")
        assert threading.active_count() == before
    assert threading.active_count() == before
    assert capsys.readouterr().err == ""


def test_a_loop_that_is_left_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    for item in Reporter().track(range(9), "refine plan", 9):
        if item == 2:
            break
    assert re.fullmatch(r"refine plan: 2 of 9 in 0\.\d s\n", capsys.readouterr().err)


@pytest.mark.parametrize("broken", [BrokenPipeError(32, "Broken pipe"), ValueError("I/O operation on closed file")])
def test_a_closed_pipe_does_not_stop_the_work(broken: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise broken

    monkeypatch.setattr(sys, "stderr", Closed())
    reporter = Reporter()
    assert list(reporter.track("ab", "measure", 2)) == ["a", "b"]
    reporter.say("on we go")


def test_a_program_without_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert list(Reporter().track("ab", "measure", 2)) == ["a", "b"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (3600, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_an_error_in_the_loop_comes_through_and_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)

    def work() -> None:
        for item in Reporter().track([1, 0], "measure", 2):
            assert 1 // item

    with pytest.raises(ZeroDivisionError):
        work()
    # The cursor is shown again.
    assert screen.getvalue().rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in screen.getvalue()


def test_a_line_goes_to_the_terminal_or_to_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = Terminal()
    with caplog.at_level(logging.INFO, "fxquant"):
        SILENT.say("one [x] cell")
        assert caplog.messages == ["one [x] cell"]
        monkeypatch.setattr(sys, "stderr", screen)
        Reporter().say("two [y] cells")
    assert screen.getvalue() == "two [y] cells\n"
    assert len(caplog.messages) == 1
