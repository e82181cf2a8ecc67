"""`Result`: a plan with the measurements it rests on; it simulates, lowers, trains, exports, reports and saves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from fxquant import flow, saved_parts
from fxquant.backends import is_known_by_name, lower
from fxquant.backends.onnx import write_onnx
from fxquant.capture import capture
from fxquant.core.errors import FileFormatError, OptionError
from fxquant.core.facts import (
    SUFFIX,
    BitAllocation,
    Budget,
    BudgetCurve,
    ChannelScales,
    CostTable,
    CostTables,
    Finalists,
    Ranges,
    Rounding,
    Routes,
    SensitivityMatrix,
    Settings,
    Surrogates,
    Target,
    WeightGrids,
    read_target,
    usage,
    write_target,
)
from fxquant.core.ir import Program, Sites
from fxquant.core.run import CalibrationSet, LossFunction, model_outputs
from fxquant.core.storage import (
    RESULT,
    StoredProgram,
    finish,
    read_json,
    staged,
    text_digest,
    write_json,
)
from fxquant.passes import measured_loss, scaled
from fxquant.qat import METHOD, TrainedValues, gather, simulated_plan, trainable
from fxquant.report import content, one_line, page, summary, write_page
from fxquant.routed import Routed, routed_of

if TYPE_CHECKING:
    from fxquant.backends.onnx import ExportReport, OnnxOptions

FORMAT_VERSION = 1
TARGET_FILE = "target.json"
"""Name under which a result keeps a target that its name alone does not say."""
HELD_OUT, SCORING = "held_out.safetensors", "scoring.safetensors"


@dataclass(frozen=True)
class Result:
    """What `quantize` returns.

    Args:
        program: calibrated float graph with all facts, the plan among them.
        held_out: calibration images that were not used for scoring; None if they were not kept.
        scoring: the other calibration images, which new plans are measured and rounded on; None if they were not kept.
    """

    program: Program = field(repr=False)
    held_out: CalibrationSet | None = field(default=None, repr=False)
    scoring: CalibrationSet | None = field(default=None, repr=False)

    @cached_property
    def judging(self) -> CalibrationSet | None:
        """The images that plans are measured on: all calibration images that were kept, mixed in pairs."""
        return flow.judged_on(self.program, self.scoring, self.held_out)

    @property
    def allocation(self) -> BitAllocation:
        """The plan."""
        return self.program[BitAllocation]

    @property
    def sensitivity(self) -> SensitivityMatrix:
        """The preferred estimator's matrix."""
        return self.program[SensitivityMatrix]

    @property
    def costs(self) -> CostTables:
        """Cost of every candidate by cost model."""
        return self.program[CostTables]

    @property
    def finalists(self) -> dict[str, BitAllocation]:
        """The plans that were compared, by name; empty where none was solved for."""
        return self.program[Finalists].plans if Finalists in self.program else {}

    @property
    def _curve(self) -> dict[str, BitAllocation]:
        return self.program[BudgetCurve].plans if BudgetCurve in self.program else {}

    @cached_property
    def simulated_program(self) -> Program:
        """The simulated graph with its facts."""
        return simulated_plan(self.program)

    @property
    def simulated(self) -> GraphModule:
        """The graph with fake-quant on each edge: the model's answer in simulation, and the graph to train."""
        return self.simulated_program.module

    @cached_property
    def lowered(self) -> GraphModule:
        """The graph on the integer kernels of the result's target, called as the model is; its output is float.

        `fxquant.lower(result, "fx_int8")` gives it on the kernels of another target.

        Raises:
            LoweringError: the target has no such graph, or this one cannot be expressed there.
        """
        return lower(self.program[Target], self.simulated)

    @property
    def routed(self) -> Routed:
        """The network that runs one of two plans for each image, where `routed=True` or a recipe asked for it.

        Raises:
            OptionError: it was not asked for, or no plan was chosen yet.
        """
        return routed_of(self.program)

    def with_plan(self, plan: BitAllocation | str | Path) -> Result:
        """Return this result with a plan made elsewhere, for example a plan.json edited by hand.

        Args:
            plan: a plan or the path of a plan.json; its status becomes "manual", its numbers are computed again.

        Raises:
            OptionError: the plan does not fit the model.
            FileFormatError: the plan file is damaged.
        """
        known = BitAllocation.from_json(plan) if isinstance(plan, str | Path) else plan
        program = flow.impose(self.program, known)
        known = replace(known, choices=program[BitAllocation].choices)
        foreign = [s for s in program[Sites].sites if known.choices[s.name] not in s.choices]
        for site in foreign:
            if not known.choices[site.name].is_float:
                raise OptionError(
                    f"the plan gives {site.name!r} {known.choices[site.name].label}, which was not measured; "
                    f"allowed: {', '.join(choice.label for choice in site.choices)} or float"
                )
        # Layers put in float by hand have no place in the cost tables, so such a plan makes no claim on its limits.
        manual = BitAllocation(
            known.choices,
            objective=self.sensitivity.predict(known.choices),
            used={} if foreign else usage(known.choices, known.limits, self.costs),
            limits={} if foreign else known.limits,
            finalists=self.allocation.finalists,
        )
        made = replace(self, program=program.with_facts(manual))
        # A width without a grid or an unknown site shows when the graph is made.
        _ = made.simulated_program
        return made

    def with_curve(self, plans: Iterable[BitAllocation]) -> Result:
        """Return this result with measured plans of other budgets, for example from `pareto`, on the report's curve.

        Raises:
            OptionError: a plan of another model, or one that was not measured.
        """
        found = dict(self._curve)
        for plan in plans:
            _ = flow.impose(self.program, plan)
            if plan.measured_loss is None:
                raise OptionError("a plan has no measured loss; pareto and resolve measure theirs on held-out images")
            found[str(Budget.of(plan.asked)) if plan.asked else plan.estimator] = plan
        return replace(self, program=self.program.with_facts(BudgetCurve(found)))

    def trainable(self, learn_steps: bool = True) -> GraphModule:
        """Return a copy of `simulated` to train with any optimizer and loop: weights, biases and steps are parameters.

        Rounding lets gradients through (straight-through); steps follow learned step size quantization (arXiv
        1902.08153). Nothing is shared with this result or the model. The graph has one mode: batch norms were folded,
        those that could not be keep their statistics until `training.reestimate`. `fxquant.training` has parameter
        groups and a distillation step; `with_trained` takes the copy back.

        Args:
            learn_steps: train the quantizers' steps too, else the weights and biases alone.
        """
        return trainable(self.simulated_program, learn_steps)

    def with_trained(self, module: GraphModule) -> Result:
        """Return this result with what was trained in a copy of its graph: weights, biases, steps and all else.

        Its `simulated` answers as the copy does, but that biases are rounded as kernels have them; it lowers, exports
        and saves like any other, and can be trained on. The loss is measured again. The float model, other
        plans and `resolve` know nothing of the training.

        Args:
            module: from `trainable`, after training; it is not changed.

        Raises:
            OptionError: a copy of another result or plan, a value that is not finite, or a step not above 0.
        """
        made = replace(self, program=self.program.with_facts(*gather(self.simulated_program, module)))
        if self.judging is None:
            return made
        loss = flow.loss_in_use(self.program, self.judging)
        reference = model_outputs(self.program.module, self.judging.inputs)
        measured = measured_loss(made.simulated, self.judging, reference, loss)
        return replace(made, program=made.program.with_facts(self.allocation.remeasured(measured, len(self.judging))))

    def to_onnx(self, path: str | Path, options: OnnxOptions | None = None) -> ExportReport:
        """Write the model as ONNX with quantize and dequantize nodes, weights packed, batch dynamic.

        Raises:
            OptionError: the options name a layer that cannot have what they ask for.
            OutputError: the path cannot be written.
            LoweringError: an op has no ONNX form.
            MissingDependencyError: the onnx extra is not installed.
        """
        return write_onnx(self.simulated, Path(path), self.metadata, options)

    @property
    def metadata(self) -> dict[str, str]:
        """What exported files say about themselves: the plan, as JSON."""
        return self.allocation.texts

    @property
    def example(self) -> tuple[torch.Tensor, ...]:
        """Two samples per input, in the shapes the model was captured with; zeros where no images were kept."""
        if self.held_out is not None and len(self.held_out) > 1:
            return self.held_out.slice(0, 2).inputs
        values = [node.meta["val"] for node in self.program.module.graph.nodes if node.op == "placeholder"]
        return tuple(torch.zeros(2, *(int(s) for s in v.shape[1:]), dtype=v.dtype) for v in values)

    @property
    def _judging_images(self) -> int | None:
        return None if self.held_out is None else len(self.held_out) + (len(self.scoring) if self.scoring else 0)

    def __repr__(self) -> str:
        return one_line(self.program)

    def _repr_html_(self) -> str:
        return page(self.program, self._judging_images)

    def summary(self) -> str:
        """Return the plan as a table for the terminal."""
        text = summary(self.program)
        return f"{text}\n\n{self.routed.summary()}" if Routes in self.program else text

    def report_data(self, extras: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return everything the report shows as plain JSON values.

        Args:
            extras: measurements the result does not hold; `fxquant.report.page_data.EXTRAS` names them.

        Raises:
            OptionError: an extra of unknown name.
        """
        return content(self.program, self.simulated_program, self._judging_images, extras)

    def report(self, path: str | Path) -> Path:
        """Write the self-contained HTML page and return its path.

        Raises:
            OutputError: the path cannot be written.
            MissingDependencyError: the report extra is not installed.
        """
        return write_page(self.report_data(), Path(path))

    def save(self, folder: str | Path) -> Path:
        """Write everything that `load` and `resolve` need: JSON, npz, safetensors and the captured `.pt2`.

        Raises:
            OutputError: the folder cannot be written.
        """
        folder, program = Path(folder), self.program
        target = program[Target].name if is_known_by_name(program[Target]) else TARGET_FILE
        kept = saved_parts.images_that_fit({HELD_OUT: self.held_out, SCORING: self.scoring})
        document = {
            "settings": program[Settings].to_json() | {"target": target},
            "costs": {name: table.to_json() for name, table in self.costs.tables.items()},
            "estimators": list(program[Surrogates].matrices),
            "finalists": {name: plan.to_json() for name, plan in self.finalists.items()},
            "curve": {name: plan.to_json() for name, plan in self._curve.items()},
            "plan": saved_parts.plan_digest(self.allocation),
            "held_out": HELD_OUT in kept,
            "scoring": SCORING in kept,
            "bank": bool(program[WeightGrids].rounded),
            "scaled": bool(program[ChannelScales].paths) if ChannelScales in program else False,
            "rounding": Rounding in program,
            "trained": TrainedValues in program,
            "graph": text_digest(str(program.module.graph)),
            "torch": torch.__version__,
        }
        with staged(folder, RESULT) as staging:
            self._write(staging, document, kept)
        return folder

    def _write(self, folder: Path, document: dict[str, Any], images: Mapping[str, CalibrationSet]) -> None:
        program = self.program
        self.allocation.to_json(folder / "plan.json")
        if not is_known_by_name(program[Target]):
            write_target(folder / TARGET_FILE, program[Target])
        for name, matrix in program[Surrogates].matrices.items():
            matrix.save(folder / f"sensitivity_{name}.npz")
        program[Ranges].save(folder / "ranges.npz")
        program[StoredProgram].save(folder / "model.pt2")
        for name, each in images.items():
            each.save(folder / name)
        if program[WeightGrids].rounded:
            program[WeightGrids].save_rounded(folder / "rounded_weights.npz")
        if ChannelScales in program and program[ChannelScales].paths:
            program[ChannelScales].save(folder / "channel_scales.npz")
        if Rounding in program:
            program[Rounding].save(folder / "rounding.npz")
        if TrainedValues in program:
            # The same file format serves: other values than a rounding's are parameters by their path.
            values = program[TrainedValues]
            Rounding(values.choices, METHOD, parameters=values.values).save(folder / "trained.npz")
        routes = saved_parts.write_routes(program[Routes], folder) if Routes in program else {}
        write_json(folder / "result.json", "result", FORMAT_VERSION, {**document, **routes})

    @staticmethod
    def load(folder: str | Path, loss: LossFunction | str | None = None) -> Result:
        """Read what `save` wrote.

        Args:
            folder: where it was saved.
            loss: the function that plans were judged by, where it was one; without it the result runs, but no other
                plan of it can be judged.

        Raises:
            FileFormatError: a file is missing, damaged, or of another version.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileFormatError(f"{folder} is not a folder; give one that a result was saved in")
        _ = finish(folder)
        document = read_json(folder / "result.json", "result", FORMAT_VERSION)
        try:
            described = str(document["settings"]["target"]).endswith(SUFFIX)
            target = read_target(folder / TARGET_FILE) if described else None
            settings = Settings.of(document["settings"], target=target, loss=loss)
            program = flow.find_sites(capture(StoredProgram.load(folder / "model.pt2"), ()), settings)
            if text_digest(str(program.module.graph)) != document["graph"]:
                raise FileFormatError(
                    f"{folder} was saved with torch {document['torch']}, whose graph torch {torch.__version__} "
                    "captures differently; quantize again"
                )
            candidates = program[Sites].candidates
            names = [saved_parts.file_name(name) for name in document["estimators"]]
            matrices = {n: saved_parts.load_matrix(folder / f"sensitivity_{n}.npz", candidates) for n in names}
            preferred, with_images = matrices[names[0]], bool(document["held_out"])
            finalists = {name: BitAllocation.from_json(plan) for name, plan in document["finalists"].items()}
            curve = {name: BitAllocation.from_json(plan) for name, plan in document.get("curve", {}).items()}
            named = {c.site for c in candidates}
            if any(set(plan.choices) != named for plan in (*finalists.values(), *curve.values())):
                raise ValueError("a finalist or a plan of the curve is that of another model")
            digest = str(document["plan"])
            tables = {name: CostTable.from_json(table, candidates) for name, table in document["costs"].items()}
            # Files from before there were such have none.
            was_scaled, trained = (bool(document.get(name)) for name in ("scaled", "trained"))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OptionError) as error:
            raise FileFormatError(f"{folder}/result.json is not an intact result ({error}); quantize again") from error
        if was_scaled:
            program = scaled(program, ChannelScales.load(folder / "channel_scales.npz"))
        program = program.with_facts(
            Ranges.load(folder / "ranges.npz"),
            Surrogates(matrices),
            preferred,
            CostTables(tables),
            Finalists(finalists),
            BudgetCurve(curve),
        )
        routes = (saved_parts.read_routes(program, folder, document),) if "routes" in document else ()
        program = saved_parts.rounded_program(program, folder, document).with_facts(*routes)
        plan = BitAllocation.from_json(folder / "plan.json")
        held_out, scoring = (
            CalibrationSet.load(folder / name) if kept else None
            for name, kept in ((HELD_OUT, with_images), (SCORING, bool(document.get("scoring", False))))
        )
        if trained:
            known = Rounding.load(folder / "trained.npz")
            program = program.with_facts(TrainedValues(known.choices, known.parameters))
        result = Result(flow.impose(program, plan), held_out, scoring)
        # A person may edit plan.json; what the solver proved does not hold for another plan.
        return result if saved_parts.plan_digest(plan) == digest else result.with_plan(plan)
