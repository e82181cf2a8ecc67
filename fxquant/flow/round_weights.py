"""Round a plan with a chain of algorithms, kept only if the loss falls on images that it did not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.fx import GraphModule

from fxquant.core.errors import OptionError
from fxquant.core.facts import (
    BitAllocation,
    Budget,
    Finalists,
    Rounding,
    SensitivityMatrix,
    Settings,
    Surrogates,
    Target,
    UnitRecord,
)
from fxquant.core.host import SILENT, Reporter, give_back, memory_named
from fxquant.core.ir import Program, gradients
from fxquant.core.run import JOIN, CalibrationSet
from fxquant.core.storage import ScoreStore, text_digest
from fxquant.flow import allocate as search
from fxquant.flow.score import judged_on, judging, loss_in_use, score_identity
from fxquant.flow.stages import ROUND
from fxquant.passes import simulate
from fxquant.passes.rounding import ROUNDERS, RoundingTask, accepted, decisive, rejection
from fxquant.passes.rounding.closed_form import verdict_losses
from fxquant.passes.rounding.learned import Reconstruction

CLOSE = 1.5
"""A uniform plan whose loss is at most this many times the chosen plan's is rounded to the end too."""
GAINED = 4.0
"""Rounding that divides the loss by more than this decides more than what plans lost before it."""
LESS_MEMORY = "give fewer images, or a smaller memory_mb or batch among the rounding options"


def algorithms(chain: str, overrides: Mapping[str, object] | None = None) -> tuple[str, ...]:
    """Return the names in a chain such as "equalize+pdquant".

    Args:
        chain: names joined by "+".
        overrides: settings of the reconstruction engine, which are checked too.

    Raises:
        OptionError: an unknown algorithm or setting, or a value out of range.
    """
    _ = Reconstruction().changed(overrides or {})
    names = tuple(name.strip() for name in chain.split(JOIN))
    for name in names:
        _ = ROUNDERS[name]
    return names


def round_plan(
    program: Program,
    chain: str,
    images: CalibrationSet,
    held_out: CalibrationSet | None = None,
    folder: Path | None = None,
    reporter: Reporter = SILENT,
    overrides: Mapping[str, object] | None = None,
    corrections: ScoreStore | None = None,
) -> Program:
    """Return the program with weights, biases and scales rounded, or as it was if the loss does not fall.

    Args:
        program: calibrated, with the plan.
        chain: names of algorithms joined by "+", each starting at the result of the one before it.
        images: to tune on.
        held_out: images that decide, mixed in pairs, whether each unit is accepted, and with those that plans are
            measured on, whether each algorithm and the chain are; None accepts everything.
        folder: keeps finished units, from which a killed run resumes; None keeps none.
        reporter: shows progress.
        overrides: settings of the reconstruction engine -> value, which replaces the algorithm's own.
        corrections: corrected inputs of earlier runs on the same images; None for those of `folder`, or none.

    Raises:
        OptionError: an unknown algorithm or setting.
        CalibrationError: the images are too few.
    """
    names, settings, plan = algorithms(chain, overrides), program[Settings], program[BitAllocation]
    loss = loss_in_use(program, images)
    # What plans are measured on, held-out images included, is made of them where it is needed.
    plain, held_out = held_out, held_out if held_out is None else judging(program, held_out)
    known = score_identity(program, images, loss) if folder is not None else {}
    if corrections is None:
        corrections = ScoreStore(None if folder is None else folder / "corrections", _fields(known, "model", "data"))
    # Units depend on the seed and the settings: each combination has its own folder. Plans share it: a unit is kept
    # under a name that says what of the plan it depends on.
    asked = text_digest(f"{sorted((overrides or {}).items())} {settings.seed} {chain}")
    rounded = program.with_facts(replace(plan, compared_loss=None))

    def measured_on() -> CalibrationSet:
        give_back()
        judged = judged_on(program, images, plain)
        assert judged is not None
        return judged

    for position, name in enumerate(names):
        place = None if folder is None else folder / f"{asked}-{position}-{name}"
        store = ScoreStore(place, {**_fields(known, "model", "data", "calibration", "settings"), "asked": asked})
        task = RoundingTask(
            rounded, images, held_out, loss, settings.seed, store, corrections, dict(overrides or {}), reporter
        )
        task = task if held_out is None else replace(task, judging=measured_on)
        with gradients(), memory_named(name, LESS_MEMORY):
            rounded = ROUNDERS[name](task)
    own = _scales_by_channel(rounded)
    if own and not program[Target].per_channel:
        note = f"{chain} was rejected: channels of {own[0]!r} get different scales, and the target runs one per weight"
        reporter.say(note)
        left = Rounding.of(program, plan.choices)
        return program.with_facts(replace(left, notes=(*left.notes, note)))
    if held_out is None:
        return rounded
    new = _new_records(program, rounded)
    if len(new) == len(names) and all(not unit.sites and not math.isnan(unit.before) for unit in new):
        # Every algorithm was judged as a whole.
        last = next((unit for unit in reversed(new) if unit.kept), new[-1])
        return _ended(program, rounded, chain, last.reason, (new[0].before, last.after), reporter)
    sets = (held_out, measured_on())
    networks = [partial(_network, each, plan) for each in (program, rounded)]
    losses = verdict_losses(program.module, networks, sets, loss)
    before, after = (decisive(each) for each in losses)
    judged = replace(plan, measured_loss=losses[0][1], images=len(sets[1]), compared_loss=None)
    reason = rejection(before, after, loss)
    rounded = rounded.with_facts(judged if reason else judged.remeasured(losses[1][1], len(sets[1])))
    return _ended(program, rounded, chain, reason, (before, after), reporter)


def _new_records(program: Program, rounded: Program) -> tuple[UnitRecord, ...]:
    records = rounded[Rounding].units if Rounding in rounded else ()
    return records[len(Rounding.of(program, program[BitAllocation].choices).units) :]


def _network(program: Program, plan: BitAllocation) -> GraphModule:
    return simulate(program, plan).module


def _ended(
    program: Program, rounded: Program, chain: str, reason: str, losses: tuple[float, float], reporter: Reporter
) -> Program:
    """Return the rounded program, or where there is a reason against it the program, with a note and its loss."""
    reporter.say(f"{chain}: loss {losses[0]:.4g} -> {losses[1]:.4g}{', rejected' if reason else ''}")
    if not reason:
        return rounded
    plan, note = rounded[BitAllocation], f"{chain} was rejected: {reason}"
    known = Rounding.of(program, plan.choices)
    kept = replace(known, units=rounded[Rounding].units, notes=(*known.notes, *rounded[Rounding].notes, note))
    return program.with_facts(
        kept, replace(program[BitAllocation], measured_loss=plan.measured_loss, images=plan.images)
    )


def finisher(
    settings: Settings,
    scoring: CalibrationSet | None,
    held_out: CalibrationSet | None,
    reporter: Reporter = SILENT,
    folder: Path | None = None,
) -> Callable[[Program], Program]:
    """Return what is done to a solved plan: its weights are rounded as the settings say, where there are images."""
    chain = settings.rounding or "nearest"

    def rounded(solved: Program) -> Program:
        assert scoring is not None
        return round_plan(solved, chain, scoring, held_out, folder, reporter, settings.rounding_options)

    def finish(solved: Program) -> Program:
        if scoring is None or chain == "nearest":
            return solved
        reporter.stage(ROUND)
        return rounded_best(solved, rounded)

    return finish


def rounded_best(solved: Program, finish: Callable[[Program], Program]) -> Program:
    """Return the solved plan finished, or another finalist where that has less loss once it is finished too.

    Plans are chosen by weights of the bank. What another rounding gains differs from plan to plan, so a uniform plan
    that came close is finished as well, and the measured loss decides. Where rounding gains so much that the losses
    before it say little, as it does where the error of activations has a mean that biases can correct, so are the plan
    of every surrogate and the uniform one of least modelled loss.

    Args:
        solved: with `Finalists` and their measured losses.
        finish: rounds the weights of a program's plan and measures it again.
    """
    plan, plans = solved[BitAllocation], solved[Finalists].plans
    known = {name: loss for name, loss in plan.finalists.items() if name in plans}
    rivals = {
        name: loss + plans[name].border_cost
        for name, loss in known.items()
        if plans[name].status == "uniform" and plans[name].choices != plan.choices
    }
    best = finish(solved)
    near = math.nan if plan.measured_loss is None else CLOSE * (plan.measured_loss + plan.border_cost)
    names = [name for name in sorted(rivals, key=rivals.__getitem__)[:1] if rivals[name] <= near]
    if plan.measured_loss is not None and accepted(plan.measured_loss, GAINED * _loss(best)):
        names += [name for name in solved[Surrogates].matrices if name in known]
        names += sorted(rivals, key=lambda name: plans[name].objective)[:1]
    tried = [plan.choices]
    for name in names:
        if plans[name].choices in tried:
            continue
        tried.append(plans[name].choices)
        rival = replace(plans[name], measured_loss=known[name], loss=plan.loss, finalists=plan.finalists)
        other = finish(solved.with_facts(rival))
        best = other if accepted(_total(best), _total(other)) else best
    return best


def _total(program: Program) -> float:
    return _loss(program) + program[BitAllocation].border_cost


def round_with_feedback(
    program: Program,
    chain: str,
    images: CalibrationSet,
    held_out: CalibrationSet,
    feedback: int = 0,
    folder: Path | None = None,
    reporter: Reporter = SILENT,
    overrides: Mapping[str, object] | None = None,
) -> Program:
    """Round the plan, then solve it again with the measured cost of each unit and round the new plan, while that helps.

    Args:
        program: calibrated, with sensitivity and the plan.
        chain: names of algorithms joined by "+".
        images: to tune on.
        held_out: images that decide what is accepted.
        feedback: how many times at most the plan is solved again; the plan of the lowest held-out loss is returned.
        folder: keeps finished units.
        reporter: shows progress.
        overrides: settings of the reconstruction engine -> value.

    Raises:
        OptionError: feedback for a plan without limits.
    """
    program = program.with_facts(replace(program[Settings], rounding=chain))
    best = round_plan(program, chain, images, held_out, folder, reporter, overrides)
    for _ in range(feedback):
        plan = best[BitAllocation]
        if not plan.limits or plan.minimized:
            raise OptionError(
                "feedback solves the plan again for limits on costs, and this plan has "
                f"{'limits on answers' if plan.minimized else 'none'}; resolve the result for such a budget first"
            )
        # Starts at the network as calibrated: the chain will change it again.
        measured = realised(best)
        program = program.with_facts(measured[Surrogates], measured[SensitivityMatrix])
        again = search.allocate(program, Budget.of(plan.limits), judged_on(program, images, held_out), reporter)
        if again[BitAllocation].choices == plan.choices:
            break
        tried = round_plan(again, chain, images, held_out, folder, reporter, overrides)
        if not accepted(_loss(best), _loss(tried)):
            break
        best = tried
    return best


def _scales_by_channel(program: Program) -> list[str]:
    """Return the sites whose channels have different scales in the rounding."""
    grids = program[Rounding].grids if Rounding in program else {}
    return [site for site, grid in grids.items() if bool((grid.scale != grid.scale.reshape(-1)[0]).any())]


def _loss(program: Program) -> float:
    measured = program[BitAllocation].measured_loss
    return math.inf if measured is None else measured


def _fields(identity: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: identity[name] for name in names if name in identity}


def realised(program: Program, lowest: float = 0.1, highest: float = 10.0) -> Program:
    """Return the program with its surrogates corrected by the measured cost of rounded units.

    The loss telescopes over prefixes of the network, `Phi(1..n) = sum_k Phi(1..k) - Phi(1..k-1)`: each unit's realised
    increment, over the increment that the surrogate predicts for it, scales the candidates of the unit's sites. With r
    the ratio of each candidate, the matrix becomes `diag(sqrt r) G diag(sqrt r)`, which keeps it convex.

    Args:
        program: with a rounding whose units were measured.
        lowest: smallest ratio used.
        highest: largest ratio used; ratios over a predicted cost near zero are noise.

    Raises:
        OptionError: no unit was measured.
    """
    plan = program[BitAllocation]
    units = _last_pass(program[Rounding])
    if not units:
        raise OptionError("no unit of this rounding was measured on held-out images; reconstruct with held-out images")
    matrices = {}
    for name, matrix in program[Surrogates].matrices.items():
        ratios: dict[str, float] = {}
        predicted, spent = matrix.predict({}), 0.0
        for unit in units:
            # A shared weight counts in the first unit that holds it, which decides it.
            new = [site for site in unit.sites if site not in ratios]
            now = matrix.predict({site: plan.choices[site] for site in (*ratios, *new)})
            expected, real = now - predicted, _realised_loss(unit) - spent
            ratio = min(highest, max(lowest, real / expected)) if expected > 0 else 1.0
            ratios |= dict.fromkeys(new, ratio)
            predicted, spent = now, _realised_loss(unit)
        matrices[name] = matrix.rescaled(ratios)
    preferred = next(iter(matrices.values()))
    return program.with_facts(Surrogates(matrices), preferred)


def _realised_loss(unit: UnitRecord) -> float:
    return unit.after if unit.kept else unit.before


def _last_pass(rounding: Rounding) -> list[UnitRecord]:
    """Return the measured units of the last algorithm that went through the network unit by unit."""
    passes: dict[str, list[UnitRecord]] = {}
    for unit in rounding.units:
        if unit.sites and math.isfinite(_realised_loss(unit)):
            passes.setdefault(unit.method, []).append(unit)
    # One unit that is the whole network has no increments for its parts.
    return max(reversed(passes.values()), key=lambda units: len(units) > 1, default=[])
