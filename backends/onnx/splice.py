"""Writes ops through PyTorch's own ONNX exporter, so that every op it knows is covered.

The exporter needs seconds to start, so all nodes that need it are exported in one call, each as a separate piece.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import onnx
import torch
from onnx import helper, inliner
from torch.export import Dim
from torch.fx import Graph, GraphModule, Node

from fxquant.backends.onnx.lowering import Lowering, dims
from fxquant.core.errors import LoweringError, first_line
from fxquant.core.ir import recurrent_shapes, shape_of, trace_line
from fxquant.core.run import is_size

_REGISTRATION = "torch.onnx._internal.exporter._registration"
NOISY = (_REGISTRATION, "onnx_ir.passes.common.initializer_deduplication")
_TABLES: dict[tuple[object, ...], object] = {}
"""What the exporter was asked for -> the table of ops that it made."""


@dataclass(frozen=True)
class Piece:
    """The ONNX form of one node.

    Args:
        nodes: in order.
        constants: what they read in addition to the inputs.
        inputs: name of an input -> FX node whose value it is.
        outputs: names of the results, one per tensor the node returns.

    Raises:
        LoweringError: no results.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    inputs: dict[str, Node]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.outputs:
            raise LoweringError("an op without results cannot be written in ONNX")


def pieces(module: GraphModule, nodes: Sequence[Node], opset: int) -> dict[Node, Piece]:
    """Return the ONNX form of each node as PyTorch's exporter writes it.

    Raises:
        LoweringError: the exporter cannot express one of them; the message names it and its source line.
    """
    try:
        return _exported(module, nodes, opset)
    except Exception as error:
        if len(nodes) > 1:
            # Only one by one it shows which node is the one.
            return {node: piece for one in nodes for node, piece in pieces(module, [one], opset).items()}
        node = nodes[0]
        sizes = [source for source in node.all_input_nodes if is_size(source)]
        reason = "an argument of it depends on the size of the input, " if sizes else ""
        raise LoweringError(
            f"{node.target} cannot be written in ONNX: {reason}{_reason(error)}; replace it at: {trace_line(node)}; "
            "PyTorch runs it: Result.simulated, or fxquant.lower(result, 'fx_int8') on integers"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost error: the outer ones are the exporter's advice to its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def insert(lowering: Lowering, node: Node, piece: Piece) -> str | tuple[str, ...]:
    """Append a piece to the graph under construction and return the names of its results."""
    builder, names = lowering.builder, {"": ""}
    names.update({name: lowering.value(source) for name, source in piece.inputs.items()})
    for tensor in piece.constants:
        names[tensor.name] = builder.constant(onnx.numpy_helper.to_array(tensor), f"{node.name}.{tensor.name}")
    for inner in piece.nodes:
        outputs = [builder.unique(node.name) if name else "" for name in inner.output]
        names.update(zip(inner.output, outputs, strict=True))
        inputs = [names[name] for name in inner.input]
        copy = helper.make_node(inner.op_type, inputs, outputs, domain=inner.domain or None)
        copy.attribute.extend(inner.attribute)
        builder.nodes.append(copy)
    results = tuple(names[name] for name in piece.outputs)
    return results[0] if isinstance(node.meta["val"], torch.Tensor) else results


def result_count(node: Node) -> int:
    """Return how many tensors a node returns."""
    value = node.meta["val"]
    return 1 if isinstance(value, torch.Tensor) else len(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on missing torchvision and shared constants, and torch's own deprecations."""
    logs = [logging.getLogger(name) for name in NOISY]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


@contextmanager
def _one_table() -> Iterator[None]:
    """Let the exporter use one table of its ops, which it builds at every call, in half of its time.

    The table is private to torch; where it is elsewhere, the exporter works as it does.
    """
    registry: Any = None
    with suppress(ImportError):
        registry = getattr(import_module(_REGISTRATION), "ONNXRegistry", None)
    made_by = getattr(registry, "__dict__", {}).get("from_torchlib")
    if not isinstance(made_by, classmethod):
        yield
        return

    def kept(kind: type, *args: Any, **kwargs: Any) -> object:
        key = (*args, *kwargs.items())
        if key not in _TABLES:
            _TABLES[key] = made_by.__func__(kind, *args, **kwargs)
        return _TABLES[key]

    registry.from_torchlib = classmethod(kept)
    try:
        yield
    finally:
        registry.from_torchlib = made_by


def _exported(module: GraphModule, nodes: Sequence[Node], opset: int) -> dict[Node, Piece]:
    graph, entries, results = Graph(), dict[str, Node](), list[Node]()
    # Placeholders must come first, so the pieces are gathered before any of them is copied.
    gathered = [_closure(node) for node in nodes]
    copies: list[dict[Node, Node]] = []
    for number, (_, sources) in enumerate(gathered):
        names = [f"n{number}_x{index}" for index in range(len(sources))]
        entries.update(zip(names, sources, strict=True))
        copies.append({source: graph.placeholder(name) for name, source in zip(names, sources, strict=True)})
    for node, (order, _), copied in zip(nodes, gathered, copies, strict=True):
        for current in order:
            copied[current] = graph.node_copy(current, copied.__getitem__)
        results.append(copied[node])
    graph.output(tuple(results))
    examples = tuple(_example(source) for source in entries.values())
    shapes = tuple(
        {axis: Dim.AUTO for axis, size in enumerate(dims(source)) if not isinstance(size, int)}
        for source in entries.values()
    )
    with _quiet(), _one_table(), recurrent_shapes(), torch.no_grad():
        exported = torch.export.export(GraphModule(module, graph), examples, dynamic_shapes=shapes)
        program = torch.onnx.export(exported, (), dynamo=True, opset_version=opset, verbose=False)
    assert program is not None
    return _split(inliner.inline_local_functions(program.model_proto), nodes, entries)


def _closure(node: Node) -> tuple[list[Node], list[Node]]:
    """Return the node with the sizes it computes with, in order, and the tensors that enter."""
    pending, order, sources = [node], list[Node](), dict[Node, None]()
    while pending:
        current = pending.pop()
        order = [current, *[other for other in order if other is not current]]
        for source in current.all_input_nodes:
            if isinstance(source.meta.get("val"), torch.Tensor):
                sources[source] = None
            else:
                pending.append(source)
    return order, list(sources)


def _example(source: Node) -> torch.Tensor:
    hints = zip(dims(source), shape_of(source), strict=True)
    # A dynamic size of 1 would be taken for a fixed one.
    sizes = [hint if isinstance(size, int) else max(hint, 2) for size, hint in hints]
    return torch.ones(sizes, dtype=source.meta["val"].dtype)


def _split(model: onnx.ModelProto, nodes: Sequence[Node], entries: dict[str, Node]) -> dict[Node, Piece]:
    """Take a model of independent pieces apart: each is what its results are computed from."""
    producers = {name: inner for inner in model.graph.node for name in inner.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    names = iter(entry.name for entry in model.graph.output)
    found = {}
    for node in nodes:
        outputs = tuple(next(names) for _ in range(result_count(node)))
        needed, pending = set[str](), list(outputs)
        while pending:
            name = pending.pop()
            if name not in needed:
                needed.add(name)
                pending.extend(producers[name].input if name in producers else ())
        inner = tuple(n for n in model.graph.node if any(name in needed for name in n.output))
        read = tuple(constants[name] for name in constants if name in needed)
        found[node] = Piece(inner, read, {name: entries[name] for name in entries if name in needed}, outputs)
    return found
