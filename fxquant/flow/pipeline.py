"""The default pipeline, stage by stage: the table of contents of the compiler."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from fxquant.backends import BACKENDS, backend
from fxquant.core.errors import OptionError, PipelineError
from fxquant.core.facts import EFFORTS, Settings, Target, found, matching, site_types
from fxquant.core.host import SILENT, Reporter
from fxquant.core.ir import PlanEdges, Program, Sites, end_sites
from fxquant.core.registry import Registry, unknown
from fxquant.core.run import JOIN, LOSSES, OBSERVERS, CalibrationSet, find_answers
from fxquant.flow.judged_factors import equalize
from fxquant.passes import (
    Calibrate,
    Canonicalize,
    CollectRanges,
    EstimateCost,
    FoldAffine,
    FoldBatchnorm,
    FoldConstants,
    InsertObservers,
    Pass,
    RewriteActivations,
    RewriteTransposed,
    RewriteVolumes,
    ScaleWeights,
    SeparateNorms,
    site_passes,
)
from fxquant.passes.allocation import SOLVERS
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.rounding.closed_form import RoundWeights
from fxquant.passes.sensitivity import ESTIMATORS
from fxquant.qat import TRAINERS, training_options
from fxquant.recipes import RECIPES

KEPT = "kept in float as asked"
END = "a first or last layer, kept in float where that loses less by measurement, or as asked"


@dataclass(frozen=True)
class Pipeline:
    """Passes that run one after the other; a wrong order fails when the pipeline is built, before any work.

    Args:
        passes: in the order in which they run.
        given: facts present before the first pass.

    Raises:
        PipelineError: a pass reads what no earlier pass writes.
    """

    passes: tuple[Pass, ...]
    given: frozenset[type] = frozenset()

    def __post_init__(self) -> None:
        known = set(self.given)
        for position, step in enumerate(self.passes):
            for kind in step.reads:
                if kind not in known:
                    name = type(step).__name__
                    raise PipelineError(f"pass {position} ({name}) reads {kind.__name__} before any pass writes it")
            known |= set(step.writes)

    def __call__(self, program: Program) -> Program:
        """Run the passes one after the other."""
        for step in self.passes:
            program = step(program)
        return program


def run(program: Program, *passes: Pass) -> Program:
    """Check the order against the program's facts and run the passes."""
    return Pipeline(passes, frozenset(program.facts))(program)


KNOWN_NAMES: Mapping[str, Collection[str]] = {
    "target": BACKENDS,
    "observer": OBSERVERS,
    "loss": LOSSES,
    "estimators": ESTIMATORS,
    "solver": SOLVERS,
    "rounding": ROUNDERS,
    "training": TRAINERS,
    "recipe": RECIPES,
}
"""Setting -> the names it may hold; more may be registered at any time."""


def check_names(settings: Settings) -> None:
    """Fail on a misspelt name before any work is done.

    Raises:
        OptionError: an unknown target, observer, loss, estimator, solver, way of rounding, training or recipe, or an
            option that its training does not have.
    """
    _ = backend(settings.target)
    given = {name: getattr(settings, name) for name in KNOWN_NAMES if name != "target"}
    given["rounding"] = ("nearest" if settings.rounding is None else settings.rounding).split(JOIN)
    given["loss"] = settings.loss.split(JOIN) if isinstance(settings.loss, str) else ()
    for setting, values in given.items():
        known = KNOWN_NAMES[setting]
        for name in (values,) if isinstance(values, str) else values or ():
            if name.strip() not in known:
                raise unknown(known.kind if isinstance(known, Registry) else setting, name, known)
    _ = training_options(settings.training, settings.training_options)


def settled(settings: Settings) -> Settings:
    """Return settings in which nothing is left to the effort or the target.

    Of the effort's estimators, those that are only defined around the float network are left out in another context,
    and those that need the curvature of the loss where it is a function.
    The weights of a plan are rounded to nearest where nothing else was asked for: `quantize` rounds them by effort.
    """
    estimators = EFFORTS[settings.effort].estimators
    if settings.context != "float":
        estimators = tuple(name for name in estimators if not ESTIMATORS[name].float_only) or ("diagonal",)
    if callable(settings.loss):
        estimators = tuple(name for name in estimators if not ESTIMATORS[name].curvature) or ("gram",)
    bits = backend(settings.target).target.default_bits
    return settings.settled(bits=bits, estimators=estimators, rounding="nearest")


def find_sites(program: Program, settings: Settings) -> Program:
    """Bring a captured graph to canonical form and find its edges, ties and sites.

    Raises:
        OptionError: a pattern matches nothing, the target does not execute a width, or no layer can be quantized.
    """
    settings = settled(settings)
    target = backend(settings.target).target
    rewrites = (RewriteTransposed(), RewriteVolumes(), FoldBatchnorm(), FoldAffine())
    program = run(program, Canonicalize(), FoldConstants(), *rewrites)
    # A saved result may name a training that is not registered where it is opened.
    if settings.training is not None and settings.training in TRAINERS and TRAINERS[settings.training].separates:
        program = run(program, SeparateNorms())
    program = run(program.with_facts(settings, target), RewriteActivations(target))
    program = run(program, *site_passes(target, settings, {}))
    names = [site.name for site in program[Sites].sites]
    types = site_types(program.module.graph, program[Sites].sites)
    kept = [name for pattern in settings.keep_float for name in matching(pattern, names, types)]
    # With float as its only choice there is nothing to measure at a site.
    kept += [site.name for site in program[Sites].sites if all(choice.is_float for choice in site.choices)]
    ends = end_sites(program.module.graph, program[Sites].sites) if settings.float_ends == "always" else ()
    reasons = dict.fromkeys(ends, END) | dict.fromkeys(kept, KEPT)
    if reasons:
        left = [name for name in names if name not in reasons]
        pins = {pattern: choice for pattern, choice in settings.pins.items() if found(pattern, left, types)}
        forbid = {pattern: choices for pattern, choices in settings.forbid.items() if found(pattern, left, types)}
        narrowed = replace(settings, pins=pins, forbid=forbid)
        program = run(program, *site_passes(target, narrowed, reasons))
    if not program[Sites].sites:
        refused = "; ".join(f"{node}: {why}" for node, why in program[Sites].refusals.items())
        raise OptionError(f"no layer can be quantized ({refused or 'the graph has no convolution or linear layer'})")
    return program.with_facts(PlanEdges(reasons))


def prepare(program: Program, settings: Settings) -> Program:
    """Find what to quantize and insert an observer on each edge.

    Raises:
        CaptureError: the model returns nothing that losses can compare.
    """
    _ = find_answers(program.module.graph)
    return run(find_sites(program, settings), InsertObservers(settings.observer))


def calibrate(program: Program, images: CalibrationSet | None, reporter: Reporter = SILENT) -> Program:
    """Equalize channels and run images through the observers (None: done already), replace observers by facts, and fix
    grids and costs."""
    settings = program[Settings]
    feed = () if images is None else (Calibrate(images, reporter=reporter),)
    program = program if images is None else equalize(program, images)
    target = program[Target]
    rounds = settings.scoring_rounding != "nearest"
    if rounds and images is None:
        reporter.say("weights are scored rounded to nearest, for want of calibration images; give them to calibrate()")
    bank = (RoundWeights(images, reporter),) if rounds and images is not None else ()
    # Costs last: what was rounded well may take other bytes than its nearest values.
    grids = (ScaleWeights(target.per_channel, even_only=bool(bank) and target.per_channel), *bank, EstimateCost(target))
    return run(program, *feed, CollectRanges(), *grids)
