"""Find the cheapest plan within limits on quality: a bisection on one cost, each step solved and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fxquant.core.errors import CalibrationError, InfeasibleBudgetError
from fxquant.core.facts import (
    LIMIT_TABLES,
    BitAllocation,
    Budget,
    BudgetCurve,
    CostTables,
    Settings,
    reachable,
    unit_of,
    usage,
)
from fxquant.core.host import SILENT, Reporter
from fxquant.core.ir import Program, Sites
from fxquant.core.run import CalibrationSet, Loss, keeps, model_outputs, quality
from fxquant.flow import allocate as search
from fxquant.flow.curve import measure_curve
from fxquant.flow.file_size import Solve, kept_in_file, measure_file
from fxquant.flow.judged_images import check_answers, learned_note
from fxquant.flow.latency import measure_latency
from fxquant.flow.score import judged_on, loss_in_use
from fxquant.flow.stages import CHOOSE, CURVE, LATENCY
from fxquant.passes import Meter
from fxquant.passes.rounding import accepted
from fxquant.qat import simulated_plan

STEPS = 8
"""Steps of the bisection at most."""
CLOSE_ENOUGH = 0.01
"""The bisection ends when its interval is this small against its upper end."""

Finish = Callable[[Program], Program]
"""Applied to a plan before its quality is measured, for example rounding."""


@dataclass(frozen=True)
class Judge:
    """Measures the quality of plans on held-out images.

    Args:
        budget: its quality limits apply.
        images: held-out images.
        reference: the float model's answers to them.
        loss: what answers are compared by.
    """

    budget: Budget
    images: CalibrationSet
    reference: Tensor
    loss: Loss

    def verdict(self, program: Program) -> Program:
        """Return the program with the measured quality, its bounds and its limits on the plan."""
        plan, limits, settings = program[BitAllocation], self.budget.quality, program[Settings]
        outputs = model_outputs(simulated_plan(program).module, self.images.inputs)
        asked = (self.images.labels, self.loss, settings.confidence, settings.seed)
        found = quality(limits, self.reference, outputs, *asked)
        judged = replace(
            plan,
            quality={name: each.value for name, each in found.items()},
            quality_bounds={name: each.bound for name, each in found.items()},
            quality_limits=limits,
            quality_images=len(self.images),
            minimized=self.budget.minimize,
        )
        # The limit on what is minimized was the search's own.
        return program.with_facts(replace(judged, limits=self.budget.limits))


def choose(
    program: Program,
    budget: Budget,
    held_out: CalibrationSet | None,
    reporter: Reporter = SILENT,
    scoring: CalibrationSet | None = None,
    folder: Path | None = None,
    finish: Finish = lambda solved: solved,
    judging: CalibrationSet | None = None,
) -> Program:
    """Choose the plan: the best within limits on costs, or the cheapest within limits on quality.

    Args:
        program: with sensitivity.
        budget: the limits.
        held_out: images that scoring did not see, on which limits on answers are measured.
        reporter: shows progress.
        scoring: images to score around the plan with; None does not.
        folder: keeps those scores.
        finish: applied to the plan that is returned, and to every plan before its quality is measured.
        judging: images that plans are compared on; None for `judged_on` scoring and held-out images.

    Raises:
        InfeasibleBudgetError: no plan keeps the limits; names the best that was measured.
        CalibrationError: quality is limited, and there are no held-out images, or no labels.
    """
    settings = program[Settings]
    if budget.quality and held_out is None:
        raise CalibrationError(f"a limit on {', '.join(budget.quality)} needs held-out images; give calibration images")
    if budget.needs_file and "file" not in program[CostTables].tables:
        program = measure_file(program, reporter)
    if budget.needs_latency and "latency" not in program[CostTables].tables and held_out is not None:
        reporter.stage(LATENCY)
        program = measure_latency(program, held_out, reporter)
    judging = judged_on(program, scoring, held_out) if judging is None else judging
    reporter.stage(CHOOSE)
    # Common to all limits that are tried: what one of them had measured is known to the next.
    meter = None if judging is None else Meter(program, judging, loss_in_use(program, judging))

    def solve(limits: Budget) -> Program:
        return search.allocate(program, limits, judging, reporter, scoring, folder, meter)

    def sketch(limits: Budget) -> Program:
        """Solve one of several steps: with fewer swaps."""
        fewer = replace(settings, refine_moves=(settings.refine_moves or 0) // STEPS)
        return search.allocate(program.with_facts(fewer), limits, judging, reporter, meter=meter).with_facts(settings)

    if held_out is None or judging is None:
        return kept_in_file(program, budget, solve, finish, sketch)[1]
    if budget.quality:
        chosen = _cheapest(program, budget, held_out, (sketch, solve), finish, reporter, scoring)
    else:
        chosen = kept_in_file(program, budget, solve, finish, sketch)[1]
    plan = chosen[BitAllocation]
    chosen = chosen.with_facts(replace(plan, notes=(*plan.notes, *learned_note(program, held_out))))
    if BudgetCurve in chosen:
        # Other budgets of one result share the curve.
        return chosen
    reporter.stage(CURVE)
    return chosen.with_facts(measure_curve(program, budget, judging, reporter, meter))


def _cheapest(
    program: Program,
    budget: Budget,
    held_out: CalibrationSet,
    solvers: tuple[Solve, Solve],
    finish: Finish,
    reporter: Reporter,
    scoring: CalibrationSet | None,
) -> Program:
    """Return the cheapest plan that keeps the limits on answers; `solvers` are for the steps and for the end."""
    check_answers(budget, held_out, program[Settings])
    loss = loss_in_use(program, held_out)
    judge = Judge(budget, held_out, model_outputs(program.module, held_out.inputs), loss)
    # Checks the shape of the answers before the first plan is solved.
    _ = quality(budget.quality, judge.reference, judge.reference, held_out.labels, loss)
    low, high = _range(program, budget)

    def attempt(bound: float, around: CalibrationSet | None = None) -> Program | None:
        limit = Budget.of({**budget.limits, budget.minimize: bound * (1 + 1e-9)})
        try:
            solved, finished = kept_in_file(program, limit, solvers[around is not None], finish, solvers[0])
        except InfeasibleBudgetError:
            return None
        judged = judge.verdict(finished)
        if not _kept(judged):
            # A lower loss may still change the answer to an image close to a decision.
            plain = judge.verdict(solved)
            judged = judged if accepted(None, None, _kept(plain), _kept(judged)) else plain
        word, measured = "kept" if _kept(judged) else "broken", _measured(judged)
        reporter.say(f"{budget.minimize} within {bound:.4g}: {measured} on {len(held_out)} held-out images, {word}")
        return judged

    return _bisect(attempt, low, high, budget, scoring)


def _bisect(
    attempt: Callable[..., Program | None], low: float, high: float, budget: Budget, scoring: CalibrationSet | None
) -> Program:
    """Return the cheapest plan found; apart from noise, quality rises with the bound."""
    best = attempt(high)
    if best is None:
        # Quality was not measured yet, so the limits on costs exclude each other.
        raise InfeasibleBudgetError(f"no plan keeps {budget}; raise a limit on costs or allow narrower bits")
    if not _kept(best):
        raise InfeasibleBudgetError(
            f"no plan keeps {budget}: the widest measured {_measured(best)}; raise the limit, give more images, allow "
            "wider bits or float (32 among bits), or round better (rounding='pdquant')"
        )
    high = min(high, _cost(best, budget))
    for step in range(STEPS):
        if high - low <= CLOSE_ENOUGH * high:
            break
        # The lowest bound first; then geometric means, because widths differ by factors.
        middle = (low * high) ** 0.5 if step else low
        found = attempt(middle)
        if found is not None and _kept(found):
            best, high = found, min(middle, _cost(found, budget))
        else:
            low = max(low, middle)
    if scoring is None:
        return best
    around = attempt(high, scoring)
    return around if around is not None and _kept(around) and _cost(around, budget) <= high * (1 + 1e-6) else best


def _kept(program: Program) -> bool:
    plan = program[BitAllocation]
    return keeps(plan.quality_bounds, plan.quality_limits)


def _measured(program: Program) -> str:
    plan, sure = program[BitAllocation], f"{100 * program[Settings].confidence:g} %"
    return ", ".join(
        f"{name} {value:.4g} (at most {plan.quality_bounds[name]:.4g} at {sure})"
        for name, value in plan.quality.items()
    )


def _cost(program: Program, budget: Budget) -> float:
    name = budget.minimize
    return usage(program[BitAllocation].choices, {name: 1.0}, program[CostTables])[name]


def _range(program: Program, budget: Budget) -> tuple[float, float]:
    """Return the least and the most that plans cost, the latter within the budget's own limit."""
    name, tables = budget.minimize, program[CostTables]
    ends = reachable(tables[LIMIT_TABLES[name][0]], program[Sites])
    low, high = (end / unit_of(name, tables) for end in ends)
    return low, max(low, min(high, budget.limits.get(name, high)))
