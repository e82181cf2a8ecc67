"""One call of CBC on a PuLP model, read with CBC's own status and bound.

PuLP's own status says "Optimal" for a time-out with an incumbent, and CBC's closing summary rounds its
lower bound to three decimals, upward too. Both are read here from the lines that can be trusted: the
solution file's first line, and the search's "best possible" figure, which has eight digits.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pulp

from fxquant.core.errors import MissingDependencyError, SolverError
from fxquant.passes.allocation.solution import FloatArray

# CBC's tolerances are absolute (1e-7 on reduced costs, 1e-4 between two incumbents), so objectives are
# brought to this size before it sees them; bit-allocation scores are often far below 1e-4.
OBJECTIVE_SIZE = 1e5
# What eight printed digits and CBC's own tolerances can hide, relative to the largest coefficient.
BOUND_MARGIN = 1e-7
# CBC looks at its clock between steps only; one that has not ended this many seconds after its limit hangs.
GRACE = 5.0
# The objective that CBC states and that of the values it prints agree to its printed digits, or one of them is wrong.
AGREEMENT = 1e-4

FAILURES = (SolverError, MissingDependencyError)
"""Errors of a call whose answer cannot be used."""

_STATED = re.compile(r"objective value\s+([-+]?\d[\d.]*(?:[eE][-+]?\d+)?)")
_PARTIAL = re.compile(r"best possible ([-+0-9.eE]+)\)")


@dataclass(frozen=True)
class CbcResult:
    """CBC's answer.

    Args:
        status: "optimal" and "infeasible" are proofs; "stopped" is a time-out.
        values: (variables,) in the order they were added, None without an incumbent.
        bound: proven lower bound in the model's unit, -inf where CBC gives none.
    """

    status: Literal["optimal", "infeasible", "stopped"]
    values: FloatArray | None
    bound: float


class Model:
    """A minimisation in PuLP whose variables keep the order in which they were added."""

    def __init__(self) -> None:
        self._problem = pulp.LpProblem("allocation", pulp.LpMinimize)
        self._variables: list[pulp.LpVariable] = []
        self._scores: list[float] = []

    def add_variable(self, name: str, score: float, *, binary: bool) -> pulp.LpVariable:
        """A variable in [0, 1] with its objective coefficient, any unit."""
        kind = pulp.LpBinary if binary else pulp.LpContinuous
        # PuLP 3.3 warns of the constructor that is the only way in PuLP 2.
        create = getattr(self._problem, "add_variable", pulp.LpVariable)
        self._variables.append(create(name, 0, 1, kind))
        self._scores.append(score)
        return self._variables[-1]

    def add_constraint(self, terms: list[tuple[pulp.LpVariable, float]], relation: str, right: float) -> None:
        """Demand sum of coefficient x variable "<=" or "==" right."""
        left = pulp.LpAffineExpression(terms)
        self._problem.addConstraint(left <= right if relation == "<=" else left == right)

    def solve(self, time_limit: float) -> CbcResult:
        """Minimise with CBC in one quiet thread, `time_limit` in wall-clock seconds.

        Raises:
            MissingDependencyError: PuLP finds no CBC program.
            SolverError: CBC died, hung, or gave an answer that contradicts itself.
        """
        objective = np.array(self._scores)
        scale = OBJECTIVE_SIZE / max(float(np.abs(objective).max(initial=0.0)), 1e-300)
        terms = zip(self._variables, (objective * scale).tolist(), strict=True)
        self._problem.setObjective(pulp.LpAffineExpression(list(terms)))
        try:
            with tempfile.TemporaryDirectory(prefix="fxquant_cbc_") as folder:
                log, solution = _call(self._problem, Path(folder), time_limit)
        except OSError as error:
            raise SolverError(
                f"CBC's files cannot be written to {tempfile.gettempdir()}: {error.strerror or error}; "
                "free some space there, or set TMPDIR"
            ) from error
        status = _status(solution[0])
        has_plan = "objective value" in solution[0] and "no integer" not in solution[0].lower()
        values = _values(solution, self._variables) if status != "infeasible" and has_plan else None
        if status == "optimal" and values is None:
            raise SolverError(f"CBC states {solution[0].strip()[:80]!r} and gives no plan")
        if values is not None:
            _check_objective(solution[0], objective * scale * values)
        return CbcResult(status, values, _bound(status, values, log, objective, scale))


def _program() -> str:
    """Path of the CBC program that came with PuLP, or of one on the search path."""
    bundled = getattr(getattr(pulp, "PULP_CBC_CMD", None), "pulp_cbc_path", None)
    for candidate in (bundled, shutil.which("cbc")):
        if candidate and Path(candidate).exists():
            return str(candidate)
    raise MissingDependencyError("PuLP finds no CBC program; reinstall pulp, whose wheel brings one")


def _call(model: pulp.LpProblem, folder: Path, time_limit: float) -> tuple[str, list[str]]:
    """Run the CBC program on the model; its log and the lines of its solution file."""
    program = _program()
    model.writeMPS(str(folder / "model.mps"))
    # "-ratio 0 -allow 0 -increment 1e-9": CBC's defaults stop at a gap that counts as optimal for it, not for us.
    options = ["-threads", "1", "-randomCbcSeed", "1", "-ratio", "0", "-allow", "0", "-increment", "1e-9"]
    command = [program, str(folder / "model.mps"), "-sec", f"{max(time_limit, 0.01):.3f}", "-timeMode", "elapsed"]
    command += [*options, "-printingOptions", "all", "-solve", "-solution", str(folder / "plan.txt")]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=time_limit + GRACE,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SolverError(f"CBC did not end {GRACE:g} s after its limit of {time_limit:.3g} s") from error
    except OSError as error:
        raise MissingDependencyError(
            f"the CBC program {program} cannot be run: {error.strerror or error}; reinstall pulp"
        ) from error
    plan = folder / "plan.txt"
    lines = plan.read_text(encoding="utf-8", errors="replace").splitlines() if plan.exists() else []
    if done.returncode or not lines:
        without = "" if lines else " and no solution file"
        raise SolverError(f"CBC ended with code {done.returncode}{without}: {done.stdout[-300:]!r}")
    return done.stdout, lines


def _status(headline: str) -> Literal["optimal", "infeasible", "stopped"]:
    """Read the solution file's first line."""
    if headline.startswith("Optimal"):
        return "optimal"
    if headline.startswith(("Infeasible", "Integer infeasible")):
        return "infeasible"
    if headline.startswith("Stopped"):
        return "stopped"
    raise SolverError(f"CBC answered {headline!r}; expected Optimal, Infeasible or Stopped")


def _values(solution: list[str], variables: list[pulp.LpVariable]) -> FloatArray:
    """Variable values from the solution file's lines "index name value reduced_cost", one for each of them."""
    found = {}
    for line in solution[1:]:
        # A leading "**" marks rows and columns outside their bounds by more than CBC's tolerance.
        words = line.replace("**", " ").split()
        if len(words) >= 3:
            try:
                found[words[1]] = float(words[2])
            except ValueError as error:
                raise SolverError(f"CBC's solution file holds {line[:80]!r}; expected a number third") from error
    missing = [variable.name for variable in variables if variable.name not in found]
    values = np.array([found.get(variable.name, 0.0) for variable in variables])
    if missing or not np.isfinite(values).all():
        raise SolverError(f"CBC's solution file gives no number to {len(missing)} of {len(variables)} variables")
    return values


def _check_objective(headline: str, parts: FloatArray) -> None:
    """Refuse values whose objective, the sum of the parts, is not the one that CBC states.

    Raises:
        SolverError: the two contradict each other.
    """
    stated = _STATED.search(headline)
    if stated is None:
        return
    difference = abs(float(stated[1]) - float(parts.sum()))
    if difference > AGREEMENT * max(1.0, float(np.abs(parts).sum())):
        raise SolverError(f"CBC states {headline.strip()[:80]!r}, and its values give {float(parts.sum()):.8g}")


def _bound(status: str, values: FloatArray | None, log: str, objective: FloatArray, scale: float) -> float:
    """Proven lower bound in the unit of `objective`, with the margin that printing and tolerances need."""
    if status == "infeasible":
        return np.inf
    margin = BOUND_MARGIN * float(np.abs(objective).max(initial=0.0))
    if status == "optimal" and values is not None:
        return float(objective @ values) - margin
    printed = _PARTIAL.findall(log)
    if not printed or abs(float(printed[-1])) >= 1e49:
        return -np.inf
    possible = float(printed[-1]) / scale
    return possible - BOUND_MARGIN * abs(possible) - margin
