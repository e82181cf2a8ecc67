"""The default pipeline, stage by stage: the table of contents of the compiler."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fxquant.backends import BACKENDS, backend, identity
from fxquant.core.errors import InfeasibleBudgetError, OptionError, PipelineError
from fxquant.core.facts import (
    EFFORTS,
    LIMIT_TABLES,
    BitAllocation,
    Budget,
    CostTables,
    Ranges,
    SensitivityMatrix,
    Settings,
    Surrogates,
    WeightGrids,
    fits,
    found,
    infeasible_message,
    matching,
    reachable,
    site_types,
    unit_of,
    usage,
)
from fxquant.core.host import ALONE, SILENT, Reporter, Shards
from fxquant.core.ir import PlanEdges, Program, Sites, gradients
from fxquant.core.registry import Registry, unknown
from fxquant.core.run import LOSSES, OBSERVERS, CalibrationSet, default_loss, model_outputs
from fxquant.core.storage import ScoreStore, tensor_digest, text_digest
from fxquant.passes import (
    Calibrate,
    Canonicalize,
    CollectRanges,
    EstimateCost,
    FoldBatchnorm,
    FoldConstants,
    InsertObservers,
    MeasureSensitivity,
    Pass,
    ScaleWeights,
    simulate,
    site_passes,
    widest_plan,
)
from fxquant.passes.allocation import SOLVERS
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.rounding.closed_form import METHODS as BANK_METHODS
from fxquant.passes.rounding.closed_form import RoundWeights
from fxquant.passes.sensitivity import ESTIMATORS

KEPT = "kept in float as asked"
JOIN = "+"
"""Separates the names of a chain of rounding algorithms."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; a wrong order fails when the pipeline is built, not after an hour of calibration.

    Args:
        passes: in the order they run.
        given: facts that are there before the first pass.

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
    with gradients():
        return Pipeline(passes, frozenset(program.facts))(program)


KNOWN_NAMES: Mapping[str, Collection[str]] = {
    "target": BACKENDS,
    "observer": OBSERVERS,
    "loss": LOSSES,
    "estimators": ESTIMATORS,
    "solver": SOLVERS,
    "scoring_rounding": ("nearest", *BANK_METHODS),
    "rounding": ROUNDERS,
}
"""Setting -> the names it may hold; more may be registered at any time."""


def check_names(settings: Settings) -> None:
    """Fail on a misspelt name before any work is done.

    Raises:
        OptionError: an unknown target, observer, loss, estimator, solver or way of rounding.
    """
    _ = backend(settings.target)
    given = {name: getattr(settings, name) for name in KNOWN_NAMES if name != "target"}
    given["rounding"] = (settings.rounding or "nearest").split(JOIN)
    for setting, values in given.items():
        known = KNOWN_NAMES[setting]
        for name in (values,) if isinstance(values, str) else values or ():
            if name.strip() not in known:
                raise unknown(known.kind if isinstance(known, Registry) else setting, name, known)


def settled(settings: Settings) -> Settings:
    """Return settings in which nothing is left to the effort.

    Of the effort's estimators, those that are only defined around the float network are left out in another context.
    The weights of a plan are rounded to nearest where nothing else was asked for: `quantize` rounds them by effort.
    """
    estimators = EFFORTS[settings.effort].estimators
    if settings.context != "float":
        estimators = tuple(name for name in estimators if not ESTIMATORS[name].float_only)
    return settings.settled(estimators=estimators, rounding="nearest")


def find_sites(program: Program, settings: Settings) -> Program:
    """Bring a captured graph to canonical form and find its edges, ties and sites.

    Raises:
        OptionError: a pattern matches nothing, the target does not execute a width, or no layer can be quantized.
    """
    settings = settled(settings)
    target = backend(settings.target).target
    program = run(program, Canonicalize(), FoldConstants(), FoldBatchnorm()).with_facts(settings, target)
    program = run(program, *site_passes(target, settings, {}))
    names = [site.name for site in program[Sites].sites]
    types = site_types(program.module.graph, program[Sites].sites)
    kept = [name for pattern in settings.keep_float for name in matching(pattern, names, types)]
    # Float as the only choice is no choice: nothing is measured there.
    kept += [site.name for site in program[Sites].sites if all(choice.is_float for choice in site.choices)]
    reasons = dict.fromkeys(kept, KEPT)
    if kept:
        left = [name for name in names if name not in kept]
        pins = {pattern: choice for pattern, choice in settings.pins.items() if found(pattern, left, types)}
        forbid = {pattern: choices for pattern, choices in settings.forbid.items() if found(pattern, left, types)}
        narrowed = replace(settings, pins=pins, forbid=forbid)
        program = run(program, *site_passes(target, narrowed, reasons))
    if not program[Sites].sites:
        refused = "; ".join(f"{node}: {why}" for node, why in program[Sites].refusals.items())
        raise OptionError(f"no layer can be quantized ({refused or 'the graph has no convolution or linear layer'})")
    return program.with_facts(PlanEdges(reasons))


def prepare(program: Program, settings: Settings) -> Program:
    """Find what to quantize and insert an observer on each edge."""
    return run(find_sites(program, settings), InsertObservers(settings.observer))


def calibrate(program: Program, images: CalibrationSet | None, reporter: Reporter = SILENT) -> Program:
    """Run images through the observers (None: they have run already), take them out, and fix all grids and costs."""
    settings = program[Settings]
    feed = () if images is None else (Calibrate(images, reporter=reporter),)
    program = run(program, *feed, CollectRanges(), *scaling(settings))
    if settings.scoring_rounding == "nearest":
        return program
    if images is None:
        raise OptionError(
            f"scoring_rounding={settings.scoring_rounding!r} needs calibration images; give them, or use 'nearest'"
        )
    return run(program, RoundWeights(images, settings.scoring_rounding, reporter))


def scaling(settings: Settings) -> tuple[Pass, Pass]:
    """Return the passes that fix weight grids and costs for a target."""
    target = backend(settings.target).target
    return ScaleWeights(target.per_channel), EstimateCost(target)


def loss_name(program: Program, images: CalibrationSet) -> str:
    """Return the loss in use: the one asked for, or the one that fits the model's output."""
    asked = program[Settings].loss
    if asked is not None:
        _ = LOSSES[asked]
        return asked
    return default_loss(model_outputs(program.module, images.slice(0, 1).inputs))


def measure_sensitivity(
    program: Program,
    images: CalibrationSet,
    folder: Path | None = None,
    reporter: Reporter = SILENT,
    shards: Shards = ALONE,
) -> Program:
    """Score every candidate, alone and in pairs, as the settings' estimators do.

    Args:
        program: calibrated.
        images: the images to score on.
        folder: where finished scores are kept, so that a killed run goes on; None keeps none.
        reporter: shows progress.
        shards: this process among those that share the work; all of them return the same.

    Raises:
        FileFormatError: the folder holds scores of something else; the message names what.
        WorkerError: another process that shares the work was lost, or was given something else.
    """
    loss, settings, device = loss_name(program, images), program[Settings], images.inputs[0].device
    with shards.group(device):
        identity = score_identity(program, images, loss) if folder is not None or shards.world_size > 1 else {}
        # Before any of them writes: a folder that all of them found empty is still empty until here.
        shards.agree(text_digest(f"{identity} {settings.estimators} {settings.seed}"), device)
        store = ScoreStore(folder, identity)
        # Scores are taken against the exact float network, so nothing but the substitutions may differ from it.
        simulated = simulate(program, widest_plan(program), round_biases=False)
        around = widest_plan(program) if settings.context == "widest" else None
        step = MeasureSensitivity(images, settings.estimators, loss, store, reporter, settings.seed, shards, around)
        scored = run(simulated, step)
    # The simulated graph is done with, but how long scoring took belongs in the log.
    return replace(program.with_facts(scored[SensitivityMatrix], scored[Surrogates]), log=scored.log)


def score_identity(program: Program, images: CalibrationSet, loss: str) -> dict[str, str]:
    """Return field -> digest of what scores depend on."""
    module = program.module
    columns = [f"{c.site}:{c.choice.label}" for c in program[Sites].candidates]
    tensors = {f"input {i}": tensor for i, tensor in enumerate(images.inputs)}
    if loss == "ce" and images.labels is not None:
        tensors["labels"] = images.labels
    weights = {name: tensor for name, tensor in module.state_dict().items() if tensor.numel()}
    settings = program[Settings]
    # Rounded, so that another summation order on the same images stays the same calibration.
    seen = [
        f"{name} {h.minimum:.4g} {h.maximum:.4g} {h.counts.sum():g}" for name, h in program[Ranges].histograms.items()
    ]
    return {
        "calibration": text_digest(f"{seen} {program[Ranges].clip}"),
        "model": tensor_digest(weights) + text_digest(str(module.graph)),
        "data": tensor_digest(tensors),
        "settings": text_digest(
            f"{columns} {loss} {settings.observer} {identity(settings.target)} {program[WeightGrids].digest()}"
        ),
    }


def check_budget(program: Program, budget: Budget) -> None:
    """Fail before the long work if a limit lies below what any plan can reach; milliseconds are not known yet.

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
    missing = sorted({site.name for site in program[Sites].sites} - set(plan.choices))
    if missing:
        raise OptionError(f"the plan lacks sites {', '.join(missing)}; name every one of them")
    limits = budget.limits if budget is not None else {}
    if not fits(plan.choices, limits, program[CostTables]):
        used = usage(plan.choices, limits, program[CostTables])
        raise OptionError(f"the plan uses {used}, the budget allows {limits}")
    return program.with_facts(plan)
