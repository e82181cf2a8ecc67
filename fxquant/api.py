"""The front door: `quantize` in one call, and the same as stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fxquant import backends, flow
from fxquant.backends.onnx import write_onnx
from fxquant.capture import capture as capture_program
from fxquant.capture import input_names
from fxquant.core.errors import CalibrationError
from fxquant.core.facts import EFFORTS, BitAllocation, Budget, BudgetCurve, BudgetLike, EffortName, Settings, Target
from fxquant.core.host import ALONE, Reporter, Shards
from fxquant.core.ir import Program
from fxquant.core.run import CalibrationSet, LossFunction, collect, images_for
from fxquant.core.storage import work_folder
from fxquant.flow import algorithms, choose, finished, judged_on, round_with_feedback, taken_images
from fxquant.passes import simulate, widest_plan
from fxquant.recipes import settings_of
from fxquant.result import Result


def quantize(
    model: nn.Module | ExportedProgram,
    calibration: object,
    budget: BudgetLike | None,
    *,
    bits: Sequence[int | str] | None = None,
    activation_bits: Sequence[int] | None = None,
    target: str | Path | Target | None = None,
    effort: EffortName | None = None,
    keep_float: Sequence[str] | None = None,
    dynamic_image: bool | None = None,
    rounding: str | None = None,
    recipe: str | None = None,
    workdir: str | Path | None = None,
    progress: bool = True,
    options: Settings | Mapping[str, Any] | None = None,
) -> Result:
    """Quantize a model within a budget, precision chosen per layer.

    Args:
        model: trained module or exported program; it is copied, never modified, moved or switched to eval.
        calibration: iterable of Tensor | tuple | dict batches, or a tensor of images; a label that follows the inputs
            is ignored unless the loss needs it. At least two images, a few hundred are good. A quarter of them is held
            out from scoring: limits on answers and roundings are checked on them.
        budget: limits on costs, on answers or both: a `Budget`, `{"average_bits": 4}` or "average_bits=4". None only
            scores and leaves every layer at its widest integer precision, for `resolve` to choose from later.
        bits: candidate weight formats: bits of evenly spaced levels, "2c" for a codebook, "3p" for powers of two,
            "2.5r" for output channels of several widths; 32 lets a layer stay in float. By default "2c", "3c", 4, 6 and
            8, and narrower codebooks where no plan of those keeps the budget.
        activation_bits: candidate activation bits, by default 8.
        target: what will run the model, by default "onnxruntime": a name, the path of a target file, or a `Target`.
        effort: "fast", "default" or "best".
        keep_float: patterns of layers (glob, "re:..." or "type:Conv2d") that stay in float.
        dynamic_image: True leaves height and width of images free, where the model takes images of any size.
        rounding: how the plan's weights are rounded: "nearest", "qronos", "pdquant" or another algorithm, or several
            joined by "+"; by default the effort's. Kept only where the loss falls.
        recipe: a published method by its name in `fxquant.recipes.RECIPES`, for example "hawq-v3"; its values apply
            wherever none is given here or in `options`.
        workdir: folder that keeps finished scores; the same call goes on where a killed one stopped.
        progress: bars on a terminal, elsewhere a line on stderr for each stage.
        options: all other settings, as a `Settings` or as name -> value: `{"seed": 1, "pins": {"stem": "W8A8"}}`. What
            is given by name above replaces what is given here.

    Returns:
        The result, whose plan was measured with the weights it ships, on calibration images mixed in pairs.

    Raises:
        InputError: the model, the calibration data or an option cannot be used, or contradicts the recipe.
        InfeasibleBudgetError: no plan keeps the budget.
        OutputError: the workdir cannot be written, found before the work.
        WorkerError: another process that shares the scoring was lost.
    """
    limits = None if budget is None else Budget.of(budget)
    named = {"bits": bits, "activation_bits": activation_bits, "target": target, "effort": effort}
    others = {"keep_float": keep_float, "dynamic_image": dynamic_image, "rounding": rounding, "recipe": recipe}
    settings = settings_of(options, **named, **others)
    if settings.rounding is None:
        settings = replace(settings, rounding=EFFORTS[settings.effort].rounding)
    flow.check_names(settings)
    flow.check_channels(settings, limits)
    _ = algorithms(settings.rounding or "", settings.rounding_options)
    shards = Shards.from_environment() if settings.distributed else ALONE
    reporter = Reporter(progress and shards.is_first)
    # Checked before hours of work whose results are to be kept there.
    folders = tuple(work_folder(workdir, name) for name in ("scores", "rounding", "training"))
    most = flow.most_images(limits, settings)
    images = collect(calibration, input_names(model), most)
    if len(images) == most:
        reporter.say(f"{most} calibration images are used, all that effort={settings.effort!r} and the budget take")
    if len(images) < 2:
        raise CalibrationError("calibration holds one image; give at least two, so that one can be held out")
    flow.check_labels(images, settings)
    scoring, held_out = flow.split_images(images, limits, settings)
    # The two parts are copies, which may be as large as everything else together.
    traced = images.take([0, 1]).inputs
    del images
    flow.check_answers(limits, held_out, settings)
    flow.check_routes(settings, limits, held_out)
    flow.check_training(scoring, settings)
    with reporter.stages(flow.stages(settings, limits)):
        reporter.stage(flow.CAPTURE)
        captured = capture_program(model, traced, dynamic_image=settings.dynamic_image)
        notes: tuple[str, ...] = ()
        if limits is not None and flow.changes_channels(settings):
            new = flow.new_channels(captured, limits, settings, taken_images(scoring, settings), folders[0], reporter)
            limits, notes = new.budget, new.notes
            captured = capture_program(new.module, traced, dynamic_image=settings.dynamic_image)
        return _search(captured, limits, settings, scoring, held_out, reporter, shards, folders, notes)


def _search(
    captured: Program,
    limits: Budget | None,
    settings: Settings,
    scoring: CalibrationSet,
    held_out: CalibrationSet,
    reporter: Reporter,
    shards: Shards,
    folders: tuple[Path | None, ...],
    notes: tuple[str, ...] = (),
) -> Result:
    """Return the result of the stages after capture; `folders` keep scores, roundings and states of training."""
    folder, place, states = folders
    taken = taken_images(scoring, settings)
    for note in (*flow.answer_note(captured), *flow.learned_note(captured, held_out)):
        reporter.say(note)
    program, joined = flow.calibrate_within(captured, settings, taken, limits, reporter)
    reporter.stage(flow.SCORE)
    program = flow.measure_sensitivity(program, taken, folder, reporter, shards)
    if limits is None:
        judging = judged_on(program, scoring, held_out)
        assert judging is not None
        plain = flow.impose(program, widest_plan(program))
        reporter.stage(flow.CURVE)
        curve = [flow.measure_curve(program, None, judging, reporter)] if shards.is_first else []
        return Result(plain.with_facts(*curve), held_out, scoring)
    finish = finished(settings, scoring, held_out, reporter, place, states)
    chosen = flow.noted(choose(program, limits, held_out, reporter, taken, folder, finish), (*notes, *joined))
    routed = flow.with_routes(program, chosen, limits, (scoring, held_out), finish, reporter)
    return Result(routed, held_out, scoring)


def capture(model: nn.Module | ExportedProgram, calibration: object, dynamic_image: bool = False) -> Program:
    """Trace a model to a functional ATen graph with a free batch.

    Args:
        model: module or exported program; it is not modified.
        calibration: batches, of which two images are used to trace with.
        dynamic_image: True leaves height and width free too.

    Raises:
        CaptureError: the model does not export, or holds weights that are not finite.
        CalibrationError: the images cannot be used.
    """
    images = collect(calibration, input_names(model), 2)
    return capture_program(model, images.slice(0, 2).inputs, dynamic_image=dynamic_image)


def prepare(program: Program, settings: Settings | None = None) -> Program:
    """Find what to quantize and insert an observer node on each quantized edge.

    The returned program's module is the model with observers: run any images through it, then `calibrate(program)`.

    Args:
        program: from `capture`.
        settings: what to search over, laid over those of their recipe; None for the defaults.
    """
    return flow.prepare(program, settings_of(settings))


def calibrate(program: Program, calibration: object = (), progress: bool = True) -> Program:
    """Fix ranges, grids and costs.

    Args:
        program: from `prepare`.
        calibration: batches to run through the observers; empty if you ran your own through `program.module`.
        progress: bars on a terminal, elsewhere a line on stderr for each stage.

    Raises:
        CalibrationError: an observer saw nothing, or a value is not finite.
    """
    empty = isinstance(calibration, tuple | list) and not calibration
    images = None if empty else images_for(program.module, calibration)
    return flow.calibrate(program, images, Reporter(progress))


def measure_sensitivity(
    program: Program, calibration: object, workdir: str | Path | None = None, progress: bool = True
) -> Program:
    """Score every candidate, alone and in pairs.

    Args:
        program: from `calibrate`.
        calibration: batches to score on.
        workdir: folder that keeps finished scores.
        progress: bars on a terminal, elsewhere a line on stderr for each stage.
    """
    folder = work_folder(workdir, "scores")
    images = images_for(program.module, calibration)
    return flow.measure_sensitivity(program, images, folder, Reporter(progress))


def allocate(
    program: Program,
    budget: BudgetLike,
    calibration: object | None = None,
    *,
    held_out: object | None = None,
    progress: bool = True,
) -> Program:
    """Choose a precision for every layer.

    Args:
        program: from `measure_sensitivity`.
        budget: the limits.
        calibration: batches to score the plan around itself on, at most `Settings.rounds` times; None does not, nor
            does a call without `held_out`.
        held_out: batches that scoring did not see, to measure plans on; None trusts the model of the loss.
        progress: bars on a terminal, elsewhere a line on stderr for each stage.

    Raises:
        InfeasibleBudgetError: no plan keeps the budget.
    """
    scoring, unseen = (None if each is None else images_for(program.module, each) for each in (calibration, held_out))
    return choose(program, Budget.of(budget), unseen, Reporter(progress), scoring)


def convert(program: Program, plan: BitAllocation | str | Path | None = None) -> Program:
    """Insert fake-quant on each edge: the simulated graph.

    Args:
        program: from `allocate`, or from `calibrate` with a plan.
        plan: a plan or the path of a plan.json that replaces the program's own.

    Raises:
        OptionError: the plan does not fit the model.
        FileFormatError: the plan file is damaged.
    """
    chosen = BitAllocation.from_json(plan) if isinstance(plan, str | Path) else plan
    program = program if chosen is None else flow.impose(program, chosen)
    return simulate(program, program[BitAllocation])


def lower(program: Program | Result, target: str | Path | Target | None = None) -> GraphModule:
    """Return the simulated graph on integer kernels, called as the model is.

    Args:
        program: from `convert`, or a result.
        target: whose kernels; None takes the program's own. "fx_int8" gives PyTorch's, whatever the plan was made for.

    Raises:
        LoweringError: the target has no such graph (the message names those that do), or this one cannot be expressed.
    """
    simulated = program.simulated_program if isinstance(program, Result) else program
    return backends.lower(simulated[Target] if target is None else target, simulated.module)


def export_onnx(program: Program, path: str | Path) -> Path:
    """Write the simulated graph as ONNX QDQ.

    Raises:
        OutputError: the path cannot be written.
        MissingDependencyError: the onnx extra is not installed.
    """
    return write_onnx(program.module, Path(path)).path


def reconstruct(
    result: Result | str | Path,
    calibration: object,
    rounding: str = "pdquant",
    *,
    options: Mapping[str, object] | None = None,
    feedback: int = 0,
    workdir: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Round a result's plan better: scales and rounding tuned against unit outputs and the prediction difference.

    Args:
        result: a result, or the folder it was saved in.
        calibration: the images that were given to `quantize`; the same quarter of them is held out and decides.
        rounding: an algorithm, or several joined by "+", for example "equalize+pdquant".
        options: settings of the reconstruction engine -> value, for example `{"iterations": 300}`.
        feedback: times the plan is solved again with the measured cost of each rounded unit, and rounded again; the
            plan with the lowest held-out loss stays.
        workdir: folder that keeps finished units; the same call goes on where a killed one stopped.
        progress: bars on a terminal, elsewhere a line on stderr for each stage.

    Raises:
        OptionError: an unknown algorithm or setting.
        CalibrationError: fewer images than a batch, or an algorithm needs what the network does not have.
    """
    known = result if isinstance(result, Result) else Result.load(result)
    folder = work_folder(workdir, "rounding")
    images, reporter = images_for(known.program.module, calibration), Reporter(progress)
    if len(images) < 2:
        raise CalibrationError("calibration holds one image; give at least two, so that one can be held out")
    scoring, held_out = images.split(known.program[Settings].held_out, known.program[Settings].seed)
    program = round_with_feedback(known.program, rounding, scoring, held_out, feedback, folder, reporter, options)
    return replace(known, program=program, held_out=held_out, scoring=scoring)


def resolve(
    result: Result | str | Path,
    budget: BudgetLike,
    held_out: object | None = None,
    progress: bool = True,
    *,
    calibration: object | None = None,
) -> Result:
    """Solve another budget from the saved scores: plans are measured, and the chosen one's weights rounded, anew.

    Args:
        result: a result, or the folder it was saved in.
        budget: the new limits.
        held_out: batches to measure plans on; None takes the images that came with the result.
        calibration: the images that were given to `quantize`, for a result that was saved without them. A plan's
            weights are rounded on them as in `quantize`; without images they stay as they were scored.
        progress: bars on a terminal, elsewhere a line on stderr for each stage.

    Raises:
        InfeasibleBudgetError: no plan keeps the budget.
    """
    known = result if isinstance(result, Result) else Result.load(result)
    program, settings, reporter = known.program, known.program[Settings], Reporter(progress)
    if calibration is not None:
        images = images_for(program.module, calibration)
        scoring, unseen = images.split(settings.held_out, settings.seed)
        known = replace(known, scoring=scoring, held_out=unseen)
    if held_out is not None:
        known = replace(known, held_out=images_for(program.module, held_out))
    if held_out is not None or calibration is not None:
        # Losses on other images do not compare with those of the curve, which is measured again.
        program = program.without(BudgetCurve)
    limits, finish = Budget.of(budget), finished(settings, known.scoring, known.held_out, reporter)
    flow.check_limits(settings, limits)
    judging = judged_on(program, None if held_out is not None else known.scoring, known.held_out)
    solved = choose(program, limits, known.held_out, reporter, finish=finish, judging=judging)
    parts = known.scoring, known.held_out
    return replace(known, program=flow.with_routes(program, solved, limits, parts, finish, reporter))


def pareto(
    result: Result | str | Path, budgets: Iterable[BudgetLike], calibration: object | None = None
) -> list[BitAllocation]:
    """Return the plan of each budget, in the order given, measured with its weights rounded as by `resolve`.

    Args:
        result: a result, or the folder it was saved in.
        budgets: the limits of each.
        calibration: as for `resolve`.

    Raises:
        InfeasibleBudgetError: one of them cannot be kept.
        OptionError: one of them is not understood.
    """
    # All of them are read before the first is solved.
    limits = [Budget.of(budget) for budget in budgets]
    known = result if isinstance(result, Result) else Result.load(result)
    return [resolve(known, limit, calibration=calibration).allocation for limit in limits]


def load(folder: str | Path, loss: LossFunction | None = None) -> Result:
    """Read a result that `Result.save` wrote; `loss` is the function that plans were judged by, where it was one.

    Raises:
        FileFormatError: a file is missing, damaged, or of another version.
    """
    return Result.load(folder, loss)


__all__ = [
    "allocate",
    "calibrate",
    "capture",
    "convert",
    "export_onnx",
    "load",
    "lower",
    "measure_sensitivity",
    "pareto",
    "prepare",
    "quantize",
    "reconstruct",
    "resolve",
]
