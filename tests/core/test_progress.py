from __future__ import annotations

import io
import logging
import sys

import pytest

from fxquant.core.progress import SILENT, Reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_title_and_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(Reporter().track(iter("abc"), "measure", 3)) == ["a", "b", "c"]
    assert "measure" in screen.getvalue()
    assert "3/3" in screen.getvalue()


@pytest.mark.parametrize("enabled", [True, False])
def test_silence_where_nobody_watches(enabled: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Reporter(enabled).track([1, 2], "measure", 2)) == [1, 2]
    assert list(SILENT.track([], "measure", 0)) == []
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


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
