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
"""Plans whose file is measured at most; after each that is too large the limit is tightened."""


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
    program: Program, budget: Budget, solve: Callable[[Budget], Program], finish: Callable[[Program], Program]
) -> tuple[Program, Program]:
    """Return the solved plan as it is and finished, solved again for less while its file is larger than allowed.

    Args:
        program: with costs, of the file too where the budget limits it.
        budget: the limits.
        solve: returns the plan of a budget.
        finish: rounds it, which may change what its weights take.

    Raises:
        InfeasibleBudgetError: no plan was found whose file keeps the limit.
        OptionError: the target's runtime reads no file.
    """
    limits = {name: limit for name, limit in budget.limits.items() if name.startswith("file")}
    solved = solve(budget)
    finished, tries, tables = finish(solved), [math.inf], program[CostTables]
    if not limits:
        return solved, finished
    for attempt in range(ROUNDS):
        plan = finished[BitAllocation]
        size = file_bytes(finished, plan)
        tries.append(size)
        used = {name: size / unit_of(name, tables) for name in limits}
        known = replace(plan, used={**plan.used, **used}, limits=budget.limits)
        if attempt:
            # Proved for tighter limits than were asked for.
            known = replace(known, status="measured", bound=math.nan, gap=math.nan)
        if all(used[name] <= limit for name, limit in limits.items()):
            return solved, finished.with_facts(known)
        predicted = usage(plan.choices, limits, tables)
        tighter = {name: limit - (used[name] - predicted[name]) for name, limit in limits.items()}
        if attempt + 1 == ROUNDS or min(tighter.values()) <= 0:
            break
        try:
            solved = solve(Budget.of({**budget.limits, **tighter}))
        except InfeasibleBudgetError:
            break
        finished = finish(solved)
    raise InfeasibleBudgetError(
        f"no plan was found whose file keeps {budget}; the smallest of {len(tries) - 1} took {min(tries):.0f} bytes; "
        "raise the limit or allow narrower bits"
    )
