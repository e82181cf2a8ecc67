"""The bytes of the exported file, as a cost like any other: predicted by a table, checked on the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fxquant.backends import backend
from fxquant.core.errors import InfeasibleBudgetError, OptionError
from fxquant.core.facts import BitAllocation, Budget, CostTable, CostTables, Target, unit_of, usage
from fxquant.core.host import SILENT, Reporter
from fxquant.core.ir import Program, Sites
from fxquant.flow.stages import MEASURE_FILE
from fxquant.passes import simulate, uniform_plans

ROUNDS = 4
"""Finished plans whose file is measured at most; after each that is too large the limit is tightened."""
CLOSE = 0.99
"""Share of the limit that the file of a first plan uses at least for the limit to stay as it is."""

Solve = Callable[[Budget], Program]
"""Budget -> the program with a plan within it; raises `InfeasibleBudgetError`."""


def file_bytes(program: Program, plan: BitAllocation) -> int:
    """Return the bytes of the file that is exported of a plan, the plan itself among its texts included.

    Raises:
        OptionError: the target's runtime reads no file.
    """
    found = backend(program[Target])
    if found.file_bytes is None:
        raise OptionError(
            f"the target {program[Target].name!r} has no file that file_mb and file_ratio could limit; "
            "limit size_mb or size_ratio"
        )
    return found.file_bytes(simulate(program, plan).module, plan.texts)


def measure_file(program: Program, reporter: Reporter = SILENT) -> Program:
    """Add the bytes of the file to the costs, from the files of the uniform plans and of the float model.

    A file holds more than weights and scales: names, and the ops that quantize and unpack. What it holds more than the
    `size` table says is shared evenly by the sites of one choice, so that the table has the bytes of every uniform
    plan exactly. With N the sites by plan and choice, the shares s solve `N s = bytes - size` in least squares.

    Args:
        program: calibrated.
        reporter: shows progress.

    Raises:
        OptionError: the target's runtime reads no file.
    """
    reporter.stage(MEASURE_FILE)
    sites, size = program[Sites], program[CostTables]["size"]
    plans = [BitAllocation(choices) for choices in uniform_plans(sites.sites).values()]
    choices = sorted({candidate.choice for candidate in sites.candidates})
    held = [list(plan.choices.values()) for plan in plans]
    counts = np.array([[labels.count(choice) for choice in choices] for labels in held], dtype=np.float64)
    measured = [file_bytes(program, plan) for plan in reporter.track(plans, "measure files", len(plans))]
    extra = np.array([found - size.of(plan.choices) for found, plan in zip(measured, plans, strict=True)])
    # Around the mean, so that a choice that no uniform plan holds is thought like the others.
    mean = extra.mean() / len(sites.sites)
    shares = mean + np.linalg.lstsq(counts, extra - counts @ np.full(len(choices), mean), rcond=None)[0]
    more = np.array([shares[choices.index(candidate.choice)] for candidate in sites.candidates])
    in_float = backend(program[Target]).file_bytes
    assert in_float is not None
    whole = float(in_float(program.module, {}))
    table = CostTable(sites.candidates, size.values + more, size.constant, whole, "bytes")
    return program.with_facts(CostTables({**program[CostTables].tables, "file": table}))


def kept_in_file(
    program: Program, budget: Budget, solve: Solve, finish: Callable[[Program], Program], sketch: Solve
) -> tuple[Program, Program]:
    """Return the solved plan as it is and finished, whose file keeps the limits.

    What the table misses at a first plan is taken from the limits before the plan is solved: for more where files are
    smaller than predicted, for less where they are larger, and for less again while the finished plan's is.

    Args:
        program: with costs, of the file too where the budget limits it.
        budget: the limits.
        solve: returns the plan of a budget.
        finish: rounds it, which may change what its weights take.
        sketch: returns a plan of a budget sooner, near the plans that are known.

    Raises:
        InfeasibleBudgetError: no plan was found whose file keeps the limit.
        OptionError: the target's runtime reads no file.
    """
    limits = {name: limit for name, limit in budget.limits.items() if name.startswith("file")}
    if not limits:
        solved = solve(budget)
        return solved, finish(solved)
    tables, tries = program[CostTables], [math.inf]

    def used(candidate: Program) -> dict[str, float]:
        tries.append(file_bytes(candidate, candidate[BitAllocation]))
        return {name: tries[-1] / unit_of(name, tables) for name in limits}

    def again(candidate: Program, found: dict[str, float], solver: Solve) -> tuple[Program, Budget] | None:
        """Return the plan within the budget less what this plan's file takes beyond its prediction, if there is one."""
        predicted = usage(candidate[BitAllocation].choices, limits, tables)
        left = {name: limit - (found[name] - predicted[name]) for name, limit in limits.items()}
        if min(left.values()) <= 0:
            return None
        within = Budget.of({**budget.limits, **left})
        try:
            return solver(within), within
        except InfeasibleBudgetError:
            return None

    drafted = sketch(budget)
    found = used(drafted)
    close = all(CLOSE * limit <= found[name] <= limit for name, limit in limits.items())
    solved, asked = (None if close else again(drafted, found, solve)) or (solve(budget), budget)
    for _ in range(ROUNDS):
        finished = finish(solved)
        found = used(finished)
        if all(found[name] <= limit for name, limit in limits.items()):
            plan = finished[BitAllocation]
            known = replace(plan, used={**plan.used, **found}, limits=budget.limits)
            # What was proved for other limits than those asked for proves nothing.
            unproved = replace(known, status="measured", bound=math.nan, gap=math.nan)
            return solved, finished.with_facts(known if asked is budget else unproved)
        other = again(finished, found, sketch)
        if other is None:
            break
        solved, asked = other
    raise InfeasibleBudgetError(
        f"no plan was found whose file keeps {budget}; the smallest of {len(tries) - 1} took {min(tries):.0f} bytes; "
        "raise the limit or allow narrower bits"
    )
