"""Round a plan better than to nearest: a chain of algorithms, kept only if the held-out loss falls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fxquant.backends import backend
from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, Budget, Rounding, SensitivityMatrix, Settings, Surrogates, UnitRecord
from fxquant.core.host import SILENT, Reporter, memory_named
from fxquant.core.ir import Program, gradients
from fxquant.core.run import CalibrationSet, model_outputs
from fxquant.core.storage import ScoreStore, text_digest
from fxquant.flow import allocate as search
from fxquant.flow.pipeline import loss_name, score_identity
from fxquant.passes import measured_loss, simulate
from fxquant.passes.rounding import ROUNDERS, RoundingTask, accepted, rejection
from fxquant.passes.rounding.learned import Reconstruction

JOIN = "+"
"""Between the names of a chain."""
LESS_MEMORY = "give fewer images, or a smaller memory_mb or batch among the rounding options"
ROUNDED = "rounded, "
"""In front of a chain's name among a plan's finalists."""


def algorithms(chain: str, overrides: Mapping[str, object] | None = None) -> tuple[str, ...]:
    """Return the names in a chain such as "equalize+pdquant".

    Args:
        chain: names joined by "+".
        overrides: settings of the reconstruction engine, which are checked along.

    Raises:
        OptionError: one of them is unknown, or a setting is, or has a value out of range.
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
    """Return the program with the plan's weights, biases and scales tuned, or as it was where that does not help.

    Args:
        program: calibrated, with the plan.
        chain: names of algorithms joined by "+", each going on from what the one before it left.
        images: to tune on.
        held_out: images that decide whether each unit, and the whole, stays; None keeps everything.
        folder: where finished units are kept, so that a killed run goes on; None keeps none.
        reporter: shows progress.
        overrides: settings of the reconstruction engine -> value, in the place of the algorithm's own.
        corrections: corrected inputs of earlier runs on the same images; None for those of `folder`, or none.

    Raises:
        OptionError: an unknown algorithm or setting.
        CalibrationError: the images are too few, or an algorithm needs what the network does not have.
    """
    names, settings, plan = algorithms(chain, overrides), program[Settings], program[BitAllocation]
    loss = loss_name(program, images)
    known = score_identity(program, images, loss) if folder is not None else {}
    if corrections is None:
        corrections = ScoreStore(None if folder is None else folder / "corrections", _fields(known, "model", "data"))
    # Units are tuned anew for another plan, another seed or other settings; each has a folder of its own.
    asked = text_digest(f"{plan.to_json()['choices']} {sorted((overrides or {}).items())} {settings.seed} {chain}")
    rounded = program
    for position, name in enumerate(names):
        place = None if folder is None else folder / f"{asked}-{position}-{name}"
        store = ScoreStore(place, {**_fields(known, "model", "data", "calibration", "settings"), "asked": asked})
        task = RoundingTask(
            rounded,
            images,
            held_out,
            loss,
            settings.seed,
            store,
            corrections,
            dict(overrides or {}),
            reporter,
        )
        with gradients(), memory_named(name, LESS_MEMORY):
            rounded = ROUNDERS[name](task)
    own = _scales_by_channel(rounded)
    if own and not backend(settings.target).target.per_channel:
        note = f"{chain} was left: it gives channels of {own[0]!r} scales of their own, which the target does not run"
        reporter.say(note)
        left = Rounding.of(program, plan.choices)
        return program.with_facts(replace(left, notes=(*left.notes, note)))
    return rounded if held_out is None else _better(program, rounded, chain, held_out, loss, reporter)


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
    """Round the plan; then solve it anew with what each unit really cost, and round again, while that helps.

    Args:
        program: calibrated, with sensitivity and the plan.
        chain: see `round_plan`, as for all but the next.
        images: to tune on.
        held_out: decides.
        feedback: times at most that the plan is solved anew; the one with the lowest held-out loss stays.
        folder: keeps finished units.
        reporter: shows progress.
        overrides: settings of the reconstruction engine.

    Raises:
        OptionError: feedback for a plan without limits.
    """
    program = program.with_facts(replace(program[Settings], rounding=chain))
    best = round_plan(program, chain, images, held_out, folder, reporter, overrides)
    for _ in range(feedback):
        plan = best[BitAllocation]
        if not plan.limits:
            raise OptionError("feedback solves the plan's limits anew, and this plan has none; resolve it for a budget")
        # From the network as it was calibrated: what a chain did to the best one's, it will do again.
        told = realised(best)
        program = program.with_facts(told[Surrogates], told[SensitivityMatrix])
        again = search.allocate(program, Budget.of(plan.limits), held_out, reporter)
        if again[BitAllocation].choices == plan.choices:
            break
        tried = round_plan(again, chain, images, held_out, folder, reporter, overrides)
        if not accepted(_loss(best), _loss(tried)):
            break
        best = tried
    return best


def _scales_by_channel(program: Program) -> list[str]:
    """Return the sites to whose channels a rounding gave scales that differ."""
    grids = program[Rounding].grids if Rounding in program else {}
    return [site for site, grid in grids.items() if bool((grid.scale != grid.scale.reshape(-1)[0]).any())]


def _loss(program: Program) -> float:
    measured = program[BitAllocation].measured_loss
    return math.inf if measured is None else measured


def _fields(identity: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: identity[name] for name in names if name in identity}


def _better(
    program: Program, rounded: Program, chain: str, held_out: CalibrationSet, loss: str, reporter: Reporter
) -> Program:
    """Return the rounded program if its held-out loss is lower, and note what was found on the plan either way."""
    plan, reference = program[BitAllocation], model_outputs(program.module, held_out.inputs, 32)

    def loss_of(candidate: Program) -> float:
        return measured_loss(simulate(candidate, plan).module, held_out, reference, loss)

    before, after = loss_of(program), loss_of(rounded)
    finalists = {**plan.finalists, ROUNDED + chain: after}
    reason = rejection(before, after, loss)
    reporter.say(f"{chain}: held-out loss {before:.4g} -> {after:.4g}{', rejected' if reason else ''}")
    if not reason:
        return rounded.with_facts(replace(plan, measured_loss=after, finalists=finalists))
    note = f"{chain} was rejected: {reason}"
    known = Rounding.of(program, plan.choices)
    kept = replace(known, units=rounded[Rounding].units, notes=(*known.notes, *rounded[Rounding].notes, note))
    return program.with_facts(kept, replace(plan, measured_loss=before, finalists=finalists))


def realised(program: Program, lowest: float = 0.1, highest: float = 10.0) -> Program:
    """Return the program with its surrogates corrected by what units really cost once rounded.

    The loss telescopes over prefixes of the network, `Phi(1..n) = sum_k Phi(1..k) - Phi(1..k-1)`: each unit's realised
    increment, over the increment that the surrogate predicts for it, scales the candidates of the unit's sites. With r
    the ratio of each candidate, the matrix becomes `diag(sqrt r) G diag(sqrt r)`, which keeps it convex.

    Args:
        program: with a rounding whose units were measured.
        lowest: smallest ratio used.
        highest: largest ratio used; a unit that costs next to nothing in the model says little.

    Raises:
        OptionError: no unit was measured.
    """
    plan = program[BitAllocation]
    units = _last_pass(program[Rounding])
    if not units:
        raise OptionError("no unit of this rounding was measured on held-out images; reconstruct with such images")
    matrices = {}
    for name, matrix in program[Surrogates].matrices.items():
        ratios: dict[str, float] = {}
        predicted, spent = matrix.predict({}), 0.0
        for unit in units:
            # A shared weight is decided, and counted, in the first unit that holds it.
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
    # One unit that is the whole network tells nothing of its parts.
    return max(reversed(passes.values()), key=lambda units: len(units) > 1, default=[])
