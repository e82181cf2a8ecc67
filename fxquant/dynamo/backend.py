"""The `torch.compile(model, backend="fxquant", options={...})` backend: quantizes each graph that Dynamo captures.

    {"budget": {"average_bits": 4}, "calibration": images}     as `fxquant.quantize`
    {"plan": "plan.json", "calibration": images}               use an existing plan; nothing is scored
    {"result": "folder"}                                       use a result that `Result.save` wrote
    {}                                                         linear layers on int8, activations scaled dynamically

What is being done is said on stderr; `"progress": False` keeps quiet. `"inductor": False` runs the integer graph
eagerly. With a budget, every option of `fxquant.quantize` is taken by its name, for example `"effort": "fast"`.

A graph is quantized at its first call, and again when its weights change. A graph in training mode, or one that does
not export, runs unchanged, with a warning. Answers carry no gradient.
"""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxquant import flow
from fxquant.api import quantize
from fxquant.backends import lower
from fxquant.backends.int8 import NAME as TARGET
from fxquant.backends.int8 import compiled, lower_dynamic
from fxquant.capture import capture
from fxquant.core.errors import CalibrationError, CaptureError, OptionError, first_line
from fxquant.core.facts import BitAllocation, Budget, BudgetLike, Settings, options_of
from fxquant.core.host import SILENT, Reporter, seconds_text
from fxquant.core.ir import Sites, rule_of
from fxquant.core.registry import unknown
from fxquant.core.run import CalibrationSet, collect
from fxquant.core.storage import StoredProgram, tensor_digest, text_digest
from fxquant.dynamo.boundary import DynamoGraph, caller_arguments, free_batch
from fxquant.dynamo.transfer import graph_of, input_nodes, renamed
from fxquant.passes import simulate
from fxquant.result import Result

Run = Callable[..., Any]
"""Takes a graph's inputs, returns its outputs."""

KEPT = 8
"""Integer graphs in the cache, so that a recompilation for another batch size does not quantize again."""

COMPILE = "compile the integer graph with Inductor"
"""What takes from seconds to minutes at the first call."""

CALL = ("workdir",)
"""Arguments of `fxquant.quantize` that are not settings."""


@dataclass(frozen=True)
class CompileOptions:
    """What `options=` may hold.

    Args:
        budget: limits, as in `fxquant.quantize`.
        calibration: as in `fxquant.quantize`; every graph iterates over it once.
        plan: a plan or the path of a plan.json.
        result: a result or the folder of one.
        progress: say on stderr what is being done.
        inductor: compile the integer graph with Inductor; where that fails it runs eagerly, with a warning.
        quantize: options of `fxquant.quantize` by name; in `options=` they are given next to the others.

    Raises:
        OptionError: options that exclude each other, or one without another that it needs.
    """

    budget: BudgetLike | None = None
    calibration: object = None
    plan: BitAllocation | str | Path | None = None
    result: Result | str | Path | None = None
    progress: bool = True
    inductor: bool = True
    quantize: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.budget is not None:
            object.__setattr__(self, "budget", Budget.of(self.budget))
        sources = [name for name in ("budget", "plan", "result") if getattr(self, name) is not None]
        if len(sources) > 1:
            raise OptionError(f"options {' and '.join(sources)} exclude each other; give one of them")
        calibrates = sources in (["budget"], ["plan"])
        if calibrates and self.calibration is None:
            raise OptionError(f"option {sources[0]!r} needs calibration images; give them as 'calibration'")
        if not calibrates and self.calibration is not None:
            raise OptionError(
                f"option 'calibration' is not used {'with ' + repr(sources[0]) if sources else 'alone'}; "
                "add 'budget' or 'plan', or leave it out"
            )
        if self.quantize and sources != ["budget"]:
            raise OptionError(f"options {', '.join(self.quantize)} are those of fxquant.quantize and need a 'budget'")

    @staticmethod
    def of(given: Mapping[str, Any] | None) -> CompileOptions:
        """Return the options that torch.compile was given.

        Raises:
            OptionError: an unknown name or a combination that is not allowed.
        """
        own = [field.name for field in fields(CompileOptions) if field.name != "quantize"]
        known = [*own, *CALL, *options_of(Settings)]
        for name in given or {}:
            if name not in known:
                raise unknown("option", name, known)
        rest = {name: value for name, value in (given or {}).items() if name not in own}
        return CompileOptions(**{name: value for name, value in (given or {}).items() if name in own}, quantize=rest)


def compile_graph(
    graph: GraphModule, inputs: Sequence[object], *, options: Mapping[str, Any] | None = None
) -> CompiledGraph:
    """Return the replacement of a graph: the `fxquant` backend of torch.compile.

    Args:
        graph: as Dynamo made it.
        inputs: the values it was traced with.
        options: see `CompileOptions`.
    """
    return CompiledGraph(DynamoGraph(graph, inputs), options)


class CompiledGraph:
    """One graph: quantized at its first call, and again when it is called with other weights.

    Args:
        source: the graph.
        options: as torch.compile got them; checked at the first call, because Dynamo would wrap errors raised earlier.
    """

    def __init__(self, source: DynamoGraph, options: Mapping[str, Any] | None) -> None:
        self.source = source
        self._given = options
        self._made: OrderedDict[tuple[object, ...], tuple[dict[str, Tensor], Run]] = OrderedDict()

    def __call__(self, *arguments: Any) -> Any:
        """Return the graph's outputs.

        Raises:
            InputError: options, calibration images or a plan that cannot be used.
            InfeasibleBudgetError: no plan fits the budget.
        """
        options, inputs = CompileOptions.of(self._given), self.source.inputs(arguments)
        refusal = self.source.refusal
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            refusal = "an input requires a gradient"
        if refusal is not None:
            _warn(f"a graph is not quantized: {refusal}; call the model in eval() mode under torch.no_grad()")
            return self.source.graph(*arguments)
        weights = self.source.weights(arguments)
        shapes = tuple((tensor.shape[1:], tensor.dtype) for tensor in inputs)
        held = tuple((id(tensor), _version(tensor)) for tensor in weights.values())
        key = (held, shapes, self.source.numbers(arguments))
        if key not in self._made:
            # Holding the weights keeps their ids from being reused by other tensors.
            self._made[key] = (weights, self._build(options, arguments, inputs))
            if len(self._made) > KEPT:
                self._made.popitem(last=False)
        with torch.no_grad():
            return self._made[key][1](*inputs)

    def _build(self, options: CompileOptions, arguments: Sequence[Any], inputs: tuple[Tensor, ...]) -> Run:
        module = self.source.bind(arguments)
        try:
            made = _integer_graph(options, module, inputs)
        except CaptureError as error:
            _warn(f"a graph stays in float: {error}")
            made = module
        run = _Inductor(made, Reporter(options.progress)) if options.inductor else made
        # Dynamo expects a flat tuple.
        return lambda *inputs: tuple(pytree.tree_leaves(run(*inputs)))


def _integer_graph(options: CompileOptions, module: GraphModule, inputs: tuple[Tensor, ...]) -> GraphModule:
    """Return the integer graph of a module, or the module itself where there is nothing to quantize.

    Raises:
        CaptureError: the graph does not export, or only for one batch size.
    """
    if options.result is not None:
        known = options.result if isinstance(options.result, Result) else Result.load(options.result)
        return graph_of(known, module)
    Reporter(options.progress).say(f"capture a graph of {len(module.graph.nodes)} ops for torch.compile")
    images = _images(options, module, inputs)
    freed = free_batch(module, inputs, inputs if images is None else images.inputs)
    captured = capture(freed, tuple(t[:2] for t in (inputs if images is None else images.inputs)))
    if not any(rule is not None and rule.weight is not None for rule in map(rule_of, captured.module.graph.nodes)):
        _warn("a graph has no convolution or linear layer and stays in float")
        return module
    if images is None:
        if options.budget is not None or options.plan is not None:
            reason = "a graph behind a graph break was first called with one image, too few to calibrate with"
        else:
            reason = "neither a budget nor a plan was given"
        made, layers = lower_dynamic(captured.module)
        done = f"{len(layers)} linear layers run on int8, their activations scaled dynamically" if layers else ""
        _warn(f"{reason}: {done or 'there is no linear layer, and the graph stays in float'}")
        return made if layers else module
    request = (options.budget, sorted(options.quantize.items()), options.plan, captured.module.graph)
    names = dict(captured.module.named_parameters()) | dict(captured.module.named_buffers())
    calibration = {f"input {k}": tensor for k, tensor in enumerate(images.inputs)}
    key = text_digest(" ".join(map(str, request))) + tensor_digest(names) + tensor_digest(calibration)
    if key not in _LOWERED:
        exported = captured[StoredProgram].exported
        if options.plan is not None:
            _LOWERED[key] = _planned(options.plan, exported, images)
        else:
            settings = {"target": TARGET, **options.quantize}
            call = {name: settings.pop(name) for name in CALL if name in settings}
            result = quantize(exported, images, options.budget, **call, progress=options.progress, options=settings)
            _LOWERED[key] = lower(TARGET, result.simulated)
        if len(_LOWERED) > KEPT:
            _LOWERED.popitem(last=False)
    return _LOWERED[key]


_LOWERED: OrderedDict[str, GraphModule] = OrderedDict()
"""Digest of weights, graph, images and options -> integer graph."""


def _images(options: CompileOptions, module: GraphModule, inputs: tuple[Tensor, ...]) -> CalibrationSet | None:
    """Return calibration images in the order of the graph's inputs, None without any.

    A graph behind a graph break does not read images, so it is calibrated on the values of its first call.

    Raises:
        CalibrationError: images of another size or type than the model is called with.
    """
    if options.calibration is None:
        return None
    names, arguments = list(input_nodes(module)), caller_arguments()
    if arguments is None:
        count = int(inputs[0].shape[0])
        if count < 2:
            return None
        _warn(
            f"a graph behind a graph break is calibrated on the {count} images of its first call; "
            "remove the graph break to calibrate on all images"
        )
        return CalibrationSet(tuple(tensor.detach().clone() for tensor in inputs))
    # Dynamo orders inputs by first use, a calibration batch by the function's signature.
    ordered = [*(name for name in arguments if name in names), *(name for name in names if name not in arguments)]
    images = collect(options.calibration, ordered)
    found = tuple(images.inputs[ordered.index(name)] for name in names)
    for name, given, called in zip(names, found, inputs, strict=True):
        if given.shape[1:] != called.shape[1:] or given.dtype != called.dtype:
            raise CalibrationError(
                f"calibration images for {name!r} are {given.dtype} of shape {tuple(given.shape[1:])}, the compiled "
                f"model is called with {called.dtype} of shape {tuple(called.shape[1:])}; use one shape and type"
            )
    return CalibrationSet(found, images.labels)


def _planned(plan: BitAllocation | str | Path, exported: ExportedProgram, images: CalibrationSet) -> GraphModule:
    """Return the integer graph of an existing plan, with ranges observed on these images.

    Raises:
        OptionError: the plan is for other layers, or leaves them all in float.
    """
    known = plan if isinstance(plan, BitAllocation) else BitAllocation.from_json(plan)
    integers = [choice for choice in known.choices.values() if not choice.is_float]
    if not integers:
        raise OptionError("the plan leaves every layer in float; give at least one layer an integer precision")
    settings = Settings(
        bits=tuple(choice.weight.label for choice in known.choices.values()),
        activation_bits=tuple(
            sorted({choice.activation_bits for choice in integers if not choice.weights_only} or {8})
        ),
        target=TARGET,
    )
    captured = capture(exported, ())
    names = [site.name for site in flow.find_sites(captured, settings)[Sites].sites]
    if known.choices.keys() < set(names):
        # Layers that were kept in float have no place in a plan.
        settings = replace(settings, keep_float=tuple(name for name in names if name not in known.choices))
    program = flow.calibrate(flow.prepare(captured, settings), images)
    program = flow.impose(program, renamed(known, [site.name for site in program[Sites].sites]))
    return lower(TARGET, simulate(program, program[BitAllocation]).module)


def _version(tensor: Tensor) -> int:
    # Inference tensors have no version counter, and cannot be changed outside inference mode.
    return 0 if tensor.is_inference() else tensor._version


class _Inductor:
    """Runs a graph through Inductor, and eagerly after its first failure."""

    def __init__(self, graph: GraphModule, reporter: Reporter) -> None:
        self._eager, self._compiled = graph, compiled(graph)
        self._works, self._reporter = True, reporter

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the graph's output."""
        if self._works:
            try:
                with self._first_call():
                    return self._compiled(*inputs)
            except Exception as error:
                self._works = False
                _warn(
                    f"Inductor failed on a graph, which runs eagerly instead ({first_line(error)}); "
                    "'inductor': False skips it"
                )
        return self._eager(*inputs)

    @contextmanager
    def _first_call(self) -> Iterator[None]:
        """Say that the graph is compiled, which takes from seconds to minutes, and how long it took."""
        reporter, self._reporter = self._reporter, SILENT
        began = time.monotonic()
        with reporter.stages((COMPILE,)):
            reporter.stage(COMPILE)
            yield
        reporter.say(f"compiled in {seconds_text(time.monotonic() - began)}")


def _warn(message: str) -> None:
    warnings.warn(f"fxquant: {message}", UserWarning, stacklevel=2)
