"""Choose the plan: solve an integer program for every surrogate, measure the plans, check their latency."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from fxquant.backends import backend
from fxquant.core.errors import CalibrationError, InfeasibleBudgetError, OptionError
from fxquant.core.facts import (
    LIMIT_TABLES,
    BitAllocation,
    Budget,
    CostTables,
    Finalists,
    Settings,
    Surrogates,
    Target,
    fits,
    infeasible_message,
    reachable,
    unit_of,
    usage,
)
from fxquant.core.host import SILENT, Reporter, time_runs, warn_if_busy
from fxquant.core.ir import Program, Sites
from fxquant.core.run import CalibrationSet
from fxquant.flow.latency import measure_latency
from fxquant.flow.score import has_choice, loss_in_use, score
from fxquant.passes import AllocateBits, Meter, VerifyAndRefine, is_better, simulate
from fxquant.passes.allocation import trust_region

LATENCY_ROUNDS = 4
"""Plans that are timed at most; after each that is too slow the limit is tightened."""
LATENCY_TOLERANCE = 1.03
"""Measured time over its limit that still counts as kept: the noise of a median."""

AROUND = ("gram",)
"""Estimators that score around a plan: n runs, exact for one changed site."""
RADIUS_SHARE = 0.25
"""Share of the sites that may change in the first round of re-scoring."""


def allocate(
    program: Program,
    budget: Budget,
    judging: CalibrationSet | None = None,
    reporter: Reporter = SILENT,
    scoring: CalibrationSet | None = None,
    folder: Path | None = None,
    meter: Meter | None = None,
) -> Program:
    """Choose the plan of least measured loss among those solved for each surrogate.

    Args:
        program: with sensitivity, and latency where the budget needs it.
        budget: the limits.
        judging: images that plans are measured on; None takes the preferred surrogate's plan unmeasured.
        reporter: shows progress.
        scoring: images to score around the plan with, at most `Settings.rounds` times; None does not.
        folder: keeps those scores, from which a killed run resumes; None keeps none.
        meter: of the program on `judging`, with what was measured for other limits; None makes one.

    Raises:
        InfeasibleBudgetError: no plan keeps the limits.
        CalibrationError: the budget needs milliseconds and there is no image to measure them with.
    """
    if budget.needs_latency and "latency" not in program[CostTables].tables:
        if judging is None:
            raise CalibrationError("a latency budget needs one image to measure with; give calibration images")
        program = measure_latency(program, judging, reporter)
    if judging is not None and meter is None:
        meter = Meter(program, judging, loss_in_use(program, judging))
    solved = _solve(program, budget, meter, reporter, scoring, folder)
    # Times that a target file gives are those of other hardware, which no clock here can check.
    if budget.needs_latency and judging is not None and not program[Target].latency:
        assert meter is not None
        solved = _keep_measured_latency(program, solved, budget, meter, reporter)
    if all(choice.is_float for choice in solved[BitAllocation].choices.values()):
        raise OptionError(f"budget {budget} is met by the float model as it is; tighten it, or leave 32 out of bits")
    return solved


def _solve(
    program: Program,
    budget: Budget,
    meter: Meter | None,
    reporter: Reporter,
    scoring: CalibrationSet | None = None,
    folder: Path | None = None,
) -> Program:
    settings = program[Settings]
    program = _contestants(_allocator(settings, budget)(program), budget)
    if meter is None:
        return program
    compares = settings.choose == "measured"
    moves = settings.refine_moves if compares else 0
    solved = VerifyAndRefine(meter, reporter, moves, requantization_cost=settings.requantization_cost)(program)
    if not compares or scoring is None or not settings.rounds or not has_choice(program):
        return solved
    return rescore_around(solved, budget, scoring, meter, reporter, folder)


def _contestants(program: Program, budget: Budget) -> Program:
    """Return the program with the finalists that `Settings.choose` allows, the first of them as its plan.

    Raises:
        InfeasibleBudgetError: only uniform plans may be taken, and none keeps the limits.
    """
    choose, plans = program[Settings].choose, program[Finalists].plans
    if choose == "measured" or len(plans) == 1:
        return program
    solved = program[BitAllocation]
    if choose == "solved":
        return program.with_facts(Finalists({solved.estimator: solved}))
    uniform = {name: plan for name, plan in plans.items() if plan.status == "uniform"}
    if not uniform:
        raise InfeasibleBudgetError(f"no uniform plan keeps {budget}; raise the limit or allow narrower bits")
    best = min(uniform.values(), key=lambda plan: plan.objective)
    return program.with_facts(best, Finalists(uniform))


def _allocator(settings: Settings, budget: Budget, near: tuple[BitAllocation, int] | None = None) -> AllocateBits:
    return AllocateBits(
        budget, settings.solver, settings.time_limit, settings.seed, settings.requantization_cost, near=near
    )


def rescore_around(
    program: Program,
    budget: Budget,
    scoring: CalibrationSet,
    meter: Meter,
    reporter: Reporter = SILENT,
    folder: Path | None = None,
) -> Program:
    """Score the plan's neighbours with everything else quantized as in the plan, and solve again near it.

    A trust-region search (see `passes.allocation.trust_region`). Every plan it tried is among the finalists, as
    "round 1, 5 sites", with its measured loss.

    Args:
        program: with a verified plan.
        budget: the limits.
        scoring: images to score with.
        meter: of the program on the images that decide; a plan is accepted only if its loss there, the cost of
            requantization included, falls by more than the noise.
        reporter: shows progress.
        folder: keeps finished scores; None keeps none.
    """
    settings = program[Settings]

    def solve(model: Surrogates, plan: BitAllocation, radius: int) -> BitAllocation | None:
        near = _allocator(settings, budget, (plan, radius))
        found = near(program.with_facts(model))[BitAllocation]
        # What was proved holds near the plan at hand, not within the budget.
        unproved = replace(found, status="measured", bound=math.nan, gap=math.nan)
        return None if found.choices == plan.choices else unproved

    start = program[BitAllocation]
    if any(choice.is_float for choice in start.choices.values()):
        # The plan's simulated graph has other quantizers than the graph that is scored.
        return program
    best, steps = trust_region(
        start,
        lambda plan: score(program, scoring, AROUND, plan, folder, reporter)[Surrogates],
        solve,
        lambda plan: meter.losses(plan) + plan.border_cost,
        is_better,
        rounds=settings.rounds,
        radius=max(2, round(RADIUS_SHARE * len(start.choices))),
    )
    # Reported without the cost of requantization, as for every other finalist.
    tried = {f"round {s.round}, {s.radius} sites": float(meter.losses(s.plan).mean()) for s in steps}
    if best is not start:
        named = f"{best.estimator} around the plan"
        best = replace(best, measured_loss=float(meter.losses(best).mean()), estimator=named)
    known = replace(best, loss=meter.loss.name, images=len(meter.images), finalists={**start.finalists, **tried})
    return program.with_facts(known)


def measured_latency(program: Program, plan: BitAllocation, images: CalibrationSet) -> dict[str, float]:
    """Return what a plan takes on one image: `latency_ms`, and `latency_ratio` against float in the same run."""
    settings, one = program[Settings], images.slice(0, 1).inputs
    graphs = (program.module, simulate(program, plan).module)
    runs = [backend(program[Target]).compile(graph, one, threads=settings.threads) for graph in graphs]
    timings = time_runs([partial(run_graph, one) for run_graph in runs], settings.threads)
    warn_if_busy(timings)
    float_ms, plan_ms = (timing.milliseconds for timing in timings)
    return {"latency_ms": plan_ms, "latency_ratio": plan_ms / float_ms}


def _keep_measured_latency(
    program: Program, solved: Program, budget: Budget, meter: Meter, reporter: Reporter
) -> Program:
    """Time the whole plan, and solve again with a tighter limit while it takes too long.

    The latency table is a model, and the measured time decides. If no plan keeps the tightened limit in the table, the
    plans that were compared so far are timed, the least loss first.

    Raises:
        InfeasibleBudgetError: no plan was found whose measured time keeps the limit.
    """
    limits = {name: limit for name, limit in budget.limits.items() if name.startswith("latency")}
    timed: list[Program] = []

    def clock(candidate: Program) -> float:
        """Return the plan's time over its limit, and keep the plan with the time it took."""
        plan = candidate[BitAllocation]
        measured = measured_latency(program, plan, meter.images)
        used = {**plan.used, **{name: measured[name] for name in limits}}
        if timed:
            # Proved for tighter limits than were asked for, or only the least loss among plans that are fast enough.
            plan = replace(plan, status="measured", bound=math.nan, gap=math.nan)
        timed.append(candidate.with_facts(replace(plan, used=used, limits=budget.limits)))
        return excess_of(timed[-1])

    def excess_of(candidate: Program) -> float:
        return max(candidate[BitAllocation].used[name] / limit for name, limit in limits.items())

    known: list[Program] = []
    tightened = budget
    for attempt in range(LATENCY_ROUNDS):
        if attempt:
            tightened = replace(tightened, **{name: getattr(tightened, name) / excess_of(timed[-1]) for name in limits})
            try:
                solved = _solve(program, tightened, meter, reporter)
            except InfeasibleBudgetError:
                break
        known += _compared(solved)
        if clock(solved) <= LATENCY_TOLERANCE:
            return timed[-1]
    for candidate in sorted(known, key=_total_loss):
        new = all(candidate[BitAllocation].choices != done[BitAllocation].choices for done in timed)
        if new and clock(candidate) <= LATENCY_TOLERANCE:
            return timed[-1]
    fastest = min(timed, key=excess_of)[BitAllocation]
    taken = ", ".join(f"{name}={fastest.used[name]:.4g}" for name in limits)
    raise InfeasibleBudgetError(
        f"no plan was found that keeps {budget} when measured; the fastest of {len(timed)} took {taken}; "
        "raise the limit"
    )


def _compared(solved: Program) -> list[Program]:
    """Return the program once for each finalist as its plan; finalists whose loss is NaN are left out."""
    losses = solved[BitAllocation].finalists
    return [
        solved.with_facts(replace(plan, measured_loss=losses[name], finalists=losses))
        for name, plan in solved[Finalists].plans.items()
        if name in losses and not math.isnan(losses[name])
    ]


def _total_loss(solved: Program) -> float:
    plan = solved[BitAllocation]
    assert plan.measured_loss is not None
    return plan.measured_loss + plan.border_cost


def check_budget(program: Program, budget: Budget) -> None:
    """Fail before the long work if a limit is below the reach of every plan; milliseconds are not known yet.

    Raises:
        InfeasibleBudgetError: a limit is out of reach; the message names the reachable range.
    """
    tables, sites = program[CostTables], program[Sites]
    known = {name: limit for name, limit in budget.limits.items() if LIMIT_TABLES[name][0] in tables.tables}
    for name, limit in known.items():
        lowest = reachable(tables[LIMIT_TABLES[name][0]], sites)[0] / unit_of(name, tables)
        if lowest > limit * (1 + 1e-9):
            raise InfeasibleBudgetError(infeasible_message(Budget.of(known), sites, tables))


def impose(program: Program, plan: BitAllocation, budget: Budget | None = None) -> Program:
    """Use a plan made elsewhere, for example edited by hand.

    Raises:
        OptionError: the plan does not fit the model, or breaks the budget.
    """
    # A weight that is only stored reads float, whatever width of activations the plan names.
    stored = {site.name for site in program[Sites].sites if site.stored}
    choices = {name: choice.alone if name in stored else choice for name, choice in plan.choices.items()}
    plan = replace(plan, choices=choices)
    missing = sorted({site.name for site in program[Sites].sites} - set(plan.choices))
    if missing:
        raise OptionError(f"the plan lacks sites {', '.join(missing)}; name every one of them")
    limits = budget.limits if budget is not None else {}
    if not fits(plan.choices, limits, program[CostTables]):
        used = usage(plan.choices, limits, program[CostTables])
        raise OptionError(f"the plan uses {used}, the budget allows {limits}")
    return program.with_facts(plan)
