"""Calibrate with candidates that can keep the budget: where the default ones cannot, first and last layers that were to
stay in float are quantized, and then narrower formats join."""

from __future__ import annotations

from dataclasses import replace

from fxquant.backends import backend
from fxquant.core.errors import InfeasibleBudgetError
from fxquant.core.facts import Budget, Settings
from fxquant.core.host import Reporter
from fxquant.core.ir import Program
from fxquant.core.run import CalibrationSet
from fxquant.flow import pipeline
from fxquant.flow.allocate import check_budget
from fxquant.flow.file_size import measure_file
from fxquant.flow.float_ends import with_float_ends
from fxquant.flow.stages import CALIBRATE

ENDS = "with the first and last layers in float no plan keeps {budget}, so they are quantized"
JOINED = "no plan of the default formats keeps {budget}, so {formats} are candidates too"


def calibrate_within(
    captured: Program, settings: Settings, images: CalibrationSet, budget: Budget | None, reporter: Reporter
) -> tuple[Program, tuple[str, ...]]:
    """Return the calibrated program, whose candidates reach the budget's limits on costs, and notes on that.

    Formats that the user or a recipe named are the only ones, and layers asked for in float stay there.

    Args:
        captured: the graph.
        settings: of the run.
        images: calibration images.
        budget: the limits; None has none.
        reporter: shows progress.

    Raises:
        InfeasibleBudgetError: a limit is out of reach of every format that the target executes.
    """
    reporter.stage(CALIBRATE)
    tried, notes = [(with_float_ends(captured, settings, images, reporter), "")], list[str]()
    if tried[0][0].float_ends == "always" and settings.float_ends != "always":
        tried.append((replace(settings, float_ends="never"), ENDS.format(budget=budget)))
    target = backend(settings.target).target
    narrower = target.narrower_bits if settings.bits is None else ()
    if narrower:
        formats = f"{', '.join(narrower[:-1])} and {narrower[-1]}"
        wider = replace(tried[-1][0], bits=(*narrower, *target.default_bits))
        tried.append((wider, JOINED.format(budget=budget, formats=formats)))
    while True:
        each, note = tried.pop(0)
        if note:
            notes.append(note)
            reporter.say(note)
            reporter.stage(CALIBRATE)
        try:
            return _calibrated(captured, each, images, budget, reporter), tuple(notes)
        except InfeasibleBudgetError:
            if not tried:
                raise


def _calibrated(
    captured: Program, settings: Settings, images: CalibrationSet, budget: Budget | None, reporter: Reporter
) -> Program:
    program = pipeline.calibrate(pipeline.prepare(captured, settings), images, reporter)
    if budget is not None:
        program = measure_file(program, reporter) if budget.needs_file else program
        check_budget(program, budget)
    return program
