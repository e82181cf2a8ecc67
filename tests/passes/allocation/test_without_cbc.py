"""CBC missing, dead, hanging or lying: the answer is as good, and the solution says what happened."""

from __future__ import annotations

import stat
import sys
import tempfile
from pathlib import Path

import numpy as np
import pulp
import pytest

from fxquant.passes.allocation import SOLVERS, Clock, Problem, Solution, cbc, iqp, reduce, solve_by_branching, solve_iqp
from tests.passes.allocation.instances import Instance, random_instance

SCRIPT = f"""#!{sys.executable} -ISs
import re, sys, time
model, plan = sys.argv[1], sys.argv[sys.argv.index("-solution") + 1]
names = sorted(set(re.findall(r"^    (\\S+)  (?:OBJ|C\\d+)", open(model).read(), re.M)))
def write(headline, value):
    with open(plan, "w") as stream:
        stream.write(headline + "\\n" + "".join(f"{{i}} {{n}} {{value}} 0\\n" for i, n in enumerate(names)))
"""

BROKEN = {
    "exits with an error": "sys.exit(3)",
    "dies behind its answer": "write('Optimal - objective value 0.00000000', 0); sys.exit(139)",
    "hangs": "time.sleep(60)",
    "writes nothing": "",
    "writes noise": "open(plan, 'wb').write(bytes(range(256)))",
    "writes words for numbers": "write('Optimal - objective value 0.00000000', 'nan?')",
    "writes NaN": "write('Optimal - objective value 0.00000000', 'nan')",
    "leaves its answer half": "write('Optimal - objective value 0.00000000', 0); names = names[:1]; "
    "write('Optimal - objective value 0.00000000', 0)",
    "chooses nothing": "write('Optimal', 0)",
    "chooses everything": "write('Optimal', 1)",
    "states another objective": "write('Optimal - objective value -99999999.00000000', 0)",
    "calls it infeasible": "write('Infeasible - objective value 0.00000000', 0)",
    "calls it unbounded": "write('Unbounded - objective value 1', 0)",
    "says what is not known": "write('Fine', 0)",
}
"""What is wrong -> what the program does, once it has read its arguments."""

MESSAGES = {
    "exits with an error": "no solution file",
    "hangs": "did not end 0.2 s after its limit of ",
    "calls it unbounded": "expected",
    "says what is not known": "expected",
}


def install(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch, mode: int = 0o755) -> None:
    program = folder / "cbc"
    program.write_text(SCRIPT + body + "\n")
    program.chmod(mode)
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", str(program))
    # It hangs for good, whatever the time that we wait.
    monkeypatch.setattr(cbc, "GRACE", 0.2)
    monkeypatch.setattr(iqp, "CBC_SECONDS", 0.2)


def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", "/nowhere/cbc")
    monkeypatch.setenv("PATH", "/nowhere")


def assert_as_good(instance: Instance, found: Solution) -> None:
    best = SOLVERS["exhaustive"](*instance.arguments)
    assert found.status == ("infeasible" if best.status == "infeasible" else "optimal")
    assert found.objective == pytest.approx(best.objective, rel=1e-6)
    assert Problem.checked(*instance.arguments).feasible(found.choice) or best.status == "infeasible"


def diagonal(seed: int) -> Instance:
    return random_instance(seed, groups=6, rows=2, kind="diagonal", tightness=0.4)


@pytest.mark.parametrize("wrong", list(BROKEN))
def test_whatever_cbc_does_the_plan_is_the_best_one(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, BROKEN[wrong], monkeypatch)
    found = SOLVERS["linear"](*diagonal(0).arguments, time_limit=1.0)
    assert_as_good(diagonal(0), found)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("CBC failed (")
    assert found.notes[0].endswith("); fell back to branch and bound")
    assert MESSAGES.get(wrong, "") in found.notes[0]


def test_not_executable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "", monkeypatch, mode=stat.S_IRUSR)
    found = SOLVERS["linear"](*diagonal(1).arguments)
    assert_as_good(diagonal(1), found)
    assert "cannot be run: Permission denied" in found.notes[0]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["convex", "indefinite", "diagonal"])
def test_without_any_program_every_solve_is_as_good(seed: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_program(monkeypatch)
    instance = random_instance(seed, groups=5, rows=2, kind=kind, tightness=seed / 8)
    assert_as_good(instance, solve_iqp(*instance.arguments))
    if kind == "diagonal":
        found = SOLVERS["linear"](*instance.arguments)
        assert_as_good(instance, found)
        assert found.notes or reduce(Problem.checked(*instance.arguments)) is None


def test_a_remainder_that_cbc_cannot_close_is_branched_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, BROKEN["exits with an error"], monkeypatch)
    monkeypatch.setattr(iqp, "CBC_PAIRS", 10**6)
    monkeypatch.setattr("fxquant.passes.allocation.branch_and_bound.TRY_ALL", 1)
    notes: list[str] = []
    for seed in (0, 2):
        instance = random_instance(seed, groups=6, rows=1, kind="indefinite", tightness=0.3)
        found = solve_iqp(*instance.arguments)
        assert_as_good(instance, found)
        notes += found.notes
    assert notes, "no instance left anything for CBC: make them harder"
    assert "CBC ended with code 3 and no solution file" in notes[0]


def test_no_room_for_cbcs_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    found = SOLVERS["linear"](*diagonal(2).arguments)
    assert_as_good(diagonal(2), found)
    assert "CBC's files cannot be written" in found.notes[0]


def test_what_cbc_spent_is_given_again() -> None:
    reduced = reduce(Problem.checked(*diagonal(3).arguments))
    assert reduced is not None
    choice, bound = solve_by_branching(reduced.problem, 0, Clock(5.0, started=-1e6))
    assert choice is not None
    assert reduced.problem.objective(choice) == pytest.approx(bound, rel=1e-6)


def test_a_sound_program_leaves_no_note() -> None:
    found = SOLVERS["linear"](*diagonal(0).arguments)
    assert found.notes == ()
    assert np.isfinite(found.bound)
