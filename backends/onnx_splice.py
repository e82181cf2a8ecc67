"""Writes one node through PyTorch's own ONNX exporter, so that every op it knows is covered."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import torch
from onnx import helper, inliner
from torch.export import Dim
from torch.fx import Graph, GraphModule, Node

from fxquant.backends.onnx_lowering import Lowering, dims
from fxquant.core.errors import LoweringError
from fxquant.core.graphs import trace_line
from fxquant.core.ops import shape_of

REGISTRATION_LOG = "torch.onnx._internal.exporter._registration"


def splice(lowering: Lowering, node: Node) -> str | tuple[str, ...]:
    """Write a node as PyTorch's exporter writes it, and return the names of its outputs.

    Raises:
        LoweringError: the exporter cannot express it either.
    """
    graph, sources = _graph_of(node)
    examples = tuple(_example(source) for source in sources)
    shapes = tuple({i: Dim.AUTO for i, s in enumerate(dims(source)) if not isinstance(s, int)} for source in sources)
    try:
        with _quiet(), torch.no_grad():
            exported = torch.export.export(GraphModule(lowering.module, graph), examples, dynamic_shapes=shapes)
            program = torch.onnx.export(exported, (), dynamo=True, opset_version=lowering.builder.opset, verbose=False)
        assert program is not None
        model = inliner.inline_local_functions(program.model_proto)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LoweringError(
            f"{node.target} cannot be written in ONNX: {reason.strip()[:200]}; replace it at: {trace_line(node)}"
        ) from error
    return _insert(lowering, node, model, sources)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on missing torchvision and torch's own deprecations."""
    log = logging.getLogger(REGISTRATION_LOG)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _graph_of(node: Node) -> tuple[Graph, list[Node]]:
    """Return a graph of the node alone, with the sizes it computes with, and the tensors that enter it."""
    graph, copies, sources = Graph(), dict[Node, Node](), list[Node]()
    pending, order = [node], list[Node]()
    while pending:
        current = pending.pop()
        order = [current, *[other for other in order if other is not current]]
        for source in current.all_input_nodes:
            if isinstance(source.meta.get("val"), torch.Tensor):
                sources.extend([source] if source not in sources else [])
            else:
                pending.append(source)
    for index, source in enumerate(sources):
        copies[source] = graph.placeholder(f"x{index}")
    for current in order:
        copies[current] = graph.node_copy(current, copies.__getitem__)
    graph.output(copies[node])
    return graph, sources


def _example(source: Node) -> torch.Tensor:
    sizes = [
        max(size, 2) if not isinstance(dim, int) else size
        for dim, size in zip(dims(source), shape_of(source), strict=True)
    ]
    return torch.ones(sizes, dtype=source.meta["val"].dtype)


def _insert(lowering: Lowering, node: Node, model: onnx.ModelProto, sources: list[Node]) -> str | tuple[str, ...]:
    builder, names = lowering.builder, {"": ""}
    # The exporter drops inputs only whose values are never read, and keeps the others by name and order.
    for index, entry in enumerate(model.graph.input):
        names[entry.name] = lowering.value(sources[index])
    for tensor in model.graph.initializer:
        names[tensor.name] = builder.constant(onnx.numpy_helper.to_array(tensor), f"{node.name}.{tensor.name}")
    for inner in model.graph.node:
        outputs = [builder.unique(node.name) if name else "" for name in inner.output]
        names.update(zip(inner.output, outputs, strict=True))
        inputs = [names[name] for name in inner.input]
        copy = helper.make_node(inner.op_type, inputs, outputs, domain=inner.domain or None)
        copy.attribute.extend(inner.attribute)
        builder.nodes.append(copy)
    results = tuple(names[entry.name] for entry in model.graph.output)
    return results[0] if len(results) == 1 and isinstance(node.meta.get("val"), torch.Tensor) else results
