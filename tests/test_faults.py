"""Runs of the command line that are stopped, run out of disk or meet damage, at points that a test can choose."""

from __future__ import annotations

import errno
import os
import re
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pulp
import pytest

import fxquant
from fxquant.cli import INTERRUPTED, main
from fxquant.core.facts import Surrogates
from fxquant.core.storage import HOLDER, LOCK, UNFINISHED, only_writer, write_json
from fxquant.passes import allocate_bits
from fxquant.passes.allocation import Solution
from tests.small import images, small, small_result

Captured = pytest.CaptureFixture[str]
BUDGET = ["--budget", "average_bits=5"]


def command(folder: Path, *more: str) -> list[str]:
    place = ["--model", "tests.small:small", "--calibration", "tests.small:images", "--output", str(folder)]
    return ["quantize", *place, "--target", "reference", "--effort", "fast", *BUDGET, "--quiet", *more]


class Fault:
    """Strikes when the n-th file is about to be written, counted from 1."""

    def __init__(self, strike: Callable[[], object], at: int, patch: pytest.MonkeyPatch) -> None:
        self.strike, self.at, self.count = strike, at, 0
        self.make: Callable[..., object] = tempfile.mkstemp
        patch.setattr(tempfile, "mkstemp", self)

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.count += 1
        if self.count == self.at:
            self.strike()
        return self.make(*args, **kwargs)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def answer(folder: Path) -> dict[str, object]:
    """Return what a run found: the plan, and every score to the last bit."""
    result = fxquant.load(folder)
    cells = {path.name: path.read_bytes() for path in (folder / "scores").glob("*.npz")}
    values = {name: m.values.tobytes() for name, m in result.program[Surrogates].matrices.items()}
    return {"plan": result.allocation.to_json(), **cells, **values}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], int]:
    """The answer of a run that nothing stops, and how many files it writes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(disk_full, 0, patch)
        assert main(command(folder)) == 0
    return answer(folder), fault.count


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("strike", "code", "message"),
    [
        (ctrl_c, INTERRUPTED, r"fxquant: stopped; (nothing was finished yet$|\d+ finished parts are kept in )"),
        (disk_full, 1, r"fxquant: error: cannot write \S+: No space left on device after 0 bytes, \d+ bytes are free"),
    ],
)
def test_stopped_at_a_write_and_gone_on_with_the_answer_is_the_same(
    strike: Callable[[], object],
    code: int,
    message: str,
    share: float,
    whole: tuple[dict[str, object], int],
    tmp_path: Path,
    capsys: Captured,
) -> None:
    expected, writes = whole
    folder = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(strike, max(1, round(share * writes)), patch)
        assert main(command(folder)) == code
        assert fault.count == fault.at
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.match(message, said[0])
    assert UNFINISHED not in said[0]
    assert not (folder / "result.json").exists()
    assert not list(folder.rglob(f"{UNFINISHED}*"))
    assert main(command(folder, "--resume")) == 0
    assert answer(folder) == expected
    assert not list(folder.rglob(".*"))


def test_a_second_run_on_the_folder_is_refused_and_another_folder_is_not(tmp_path: Path, capsys: Captured) -> None:
    with only_writer(tmp_path):
        assert main(command(tmp_path, "--resume")) == 1
        assert f"{tmp_path} is being written by another run, process {os.getpid()}" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, HOLDER]


def test_a_workdir_that_cannot_be_written_is_found_before_the_work(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "work")
    for arguments in (
        [*command(tmp_path / "out"), "--workdir", place, "--model", "tests.small:failing"],
        ["export", str(tmp_path), "--output", f"{place}/a.onnx"],
    ):
        code = main(arguments)
        said = capsys.readouterr().err
        # Had the work begun, the failing model or the missing result would have been reported.
        assert (code, "cannot write" in said) == (1, True) if arguments[0] == "quantize" else code == 2
    with pytest.raises(fxquant.FxquantError, match="cannot write"):
        fxquant.quantize(small(), iter([ctrl_c]), None, workdir=place)


def test_scores_of_another_version_name_both(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "scores").mkdir()
    for version, message in ((1, "an older fxquant wrote it"), (99, "a newer fxquant wrote it")):
        write_json(tmp_path / "scores" / "identity.json", "scores", version, {})
        assert main(command(tmp_path, "--resume")) == 2
        said = capsys.readouterr().err
        assert f"format version {version}, this fxquant reads 2; {message}" in said
        assert "use another workdir, or remove" in said


def test_without_cbc_the_summary_and_the_report_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = small_result()
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", "/nowhere/cbc")
    monkeypatch.setenv("PATH", "/nowhere")
    result = fxquant.resolve(known, fxquant.Budget(average_bits=5.0), progress=False)
    assert result.allocation.choices == known.allocation.choices
    message = "CBC failed (PuLP finds no CBC program; reinstall pulp, whose wheel brings one)"
    assert message in " ".join(result.summary().split())
    result.save(tmp_path)
    assert message in " ".join(fxquant.load(tmp_path).summary().split())
    assert "CBC" not in known.summary()


def test_ctrl_c_in_a_solve_ends_the_run_whatever_the_solver_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(values: np.ndarray, groups: list[np.ndarray], *_: object, **__: object) -> Solution:
        choice = np.zeros(len(values), dtype=bool)
        choice[[group[-1] for group in groups]] = True
        return Solution(choice, 1.0, 0.0, 1.0, "feasible", 0.1, interrupted=True)

    monkeypatch.setattr(allocate_bits, "SOLVERS", {"iqp": interrupted})
    with pytest.raises(KeyboardInterrupt):
        fxquant.quantize(small(), images(), fxquant.Budget(average_bits=5.0), effort="fast", target="reference")


def test_what_is_kept_is_said_last(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    # The header, the only cell of single choices, a cell of pairs; in the middle of the second one the stop comes.
    Fault(ctrl_c, 4, monkeypatch)
    arguments = [text for text in command(tmp_path / "out") if text != "--quiet"]
    assert main([*arguments, "--estimators", "pairs"]) == INTERRUPTED
    *stages, last = capsys.readouterr().err.splitlines()
    # The stage that was left says how far it came when its loop is taken down.
    assert re.search(r"^score pairs .*: 0 of \d\d? in ", stages[-1])
    assert last.startswith("fxquant: stopped; 2 finished parts are kept in ")
