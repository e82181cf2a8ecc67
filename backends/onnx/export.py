"""A simulated or float graph in, a standard ONNX QDQ model out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.backends.exact import value_names
from fxquant.backends.explicit_graph import to_qdq
from fxquant.backends.onnx.blocks import to_blocks
from fxquant.backends.onnx.builder import GraphBuilder
from fxquant.backends.onnx.entries import output_names, value_info
from fxquant.backends.onnx.export_options import OnnxOptions
from fxquant.backends.onnx.lowering import Lowering
from fxquant.backends.onnx.model_file import write_model
from fxquant.backends.onnx.openvino import add_biases
from fxquant.backends.onnx.recurrent import EMITTERS, drop_zero_states
from fxquant.backends.onnx.rewrites import fuse_integers
from fxquant.backends.onnx.size_check import check_sizes
from fxquant.backends.onnx.splice import Piece, insert, pieces, result_count
from fxquant.backends.onnx.stem import fold_stems
from fxquant.backends.qdq_ops import EDGE, dequantize_channels, stored_channels
from fxquant.core.errors import LoweringError, OptionError
from fxquant.core.run import is_size, leading_names

NO_VALUE = ("placeholder", "output", "get_attr")
LAZY = (dequantize_channels, stored_channels, torch.ops.aten.sym_size.int)


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Args:
        path: the file.
        bytes: its size on disk, that of its external weights included.
        opset: operator set of the file.
        nodes: ONNX op -> number of nodes.
        weight_only: layers with one weight scale per block, which multiply floats.
        unpacked: layers whose weights would take fewer bytes in a form that the runtime would not unpack beforehand.

    Raises:
        OptionError: an empty file.
    """

    path: Path
    bytes: int
    opset: int
    nodes: dict[str, int]
    weight_only: tuple[str, ...] = ()
    unpacked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bytes <= 0 or not self.nodes:
            raise OptionError(f"{self.path} holds no model")


def to_onnx(
    module: GraphModule,
    metadata: Mapping[str, str] | None = None,
    options: OnnxOptions | None = None,
) -> onnx.ModelProto:
    """Return the ONNX model of a simulated or float graph.

    Args:
        module: ATen graph with traced shapes, FakeQuantize modules where it is quantized; it is not changed.
        metadata: texts kept in the file, for example the plan.
        options: None for the defaults.

    Raises:
        LoweringError: an op has no ONNX form.
        OptionError: `options.weight_only` names a layer that cannot have it.
    """
    return _model(module, metadata or {}, options or OnnxOptions())[0]


def _model(
    module: GraphModule, metadata: Mapping[str, str], options: OnnxOptions
) -> tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...]]:
    """Return the model, the layers on blocks, and those whose weights are not packed."""
    blocks, weight_only = to_blocks(module, options.weight_only, options.block_size)
    # OpenVINO computes a layer in float where a reshape separates it from a residual sum.
    for_openvino = options.runtime == "openvino"
    qdq = drop_zero_states(fuse_integers(to_qdq(blocks), matrices=not for_openvino))
    qdq = add_biases(qdq) if for_openvino else fold_stems(qdq)
    names = value_names(module)
    labels = {node.name: names[node.meta[EDGE]] for node in qdq.graph.nodes if node.meta.get(EDGE) in names}
    # What is in front of answers that jump can be compared where the answers cannot; OpenVINO's biases move it.
    leading = {} if for_openvino else leading_names(module.graph)
    known: dict[Node, Piece] = {}
    model, unpacked, missing = _attempt(qdq, known, options, labels, leading)
    if missing:
        known = pieces(qdq, missing, int(model.opset_import[0].version))
        model, unpacked, _ = _attempt(qdq, known, options, labels, leading)
    for key, text in metadata.items():
        model.metadata_props.add(key=key, value=text)
    return model, weight_only, unpacked


def _attempt(
    qdq: GraphModule,
    known: dict[Node, Piece],
    options: OnnxOptions,
    labels: Mapping[str, str],
    leading: Mapping[str, str],
) -> tuple[onnx.ModelProto, tuple[str, ...], list[Node]]:
    """Write the graph, and return it, layers that are not packed, and what neither a table nor `known` can write."""
    builder = GraphBuilder()
    lowering = Lowering(qdq, builder, options)
    results, missing = list[Node](), list[Node]()
    map_arg(qdq.graph.output_node().args, results.append)
    # What others know by name goes before what only this file calls so.
    for text in (*labels.values(), *leading.values()):
        _ = builder.unique(text)
    # A graph's own name for an input avoids words of Python, such as input.
    entries = {node: builder.unique(str(node.target)) for node in qdq.graph.nodes if node.op == "placeholder"}
    inputs = [value_info(node, name) for node, name in entries.items() if isinstance(node.meta.get("val"), Tensor)]
    lowering.values.update(entries)
    names = [builder.unique(name) for name in output_names(qdq.graph)]
    for node in qdq.graph.nodes:
        if node.op in NO_VALUE or node.target in LAZY or not isinstance(_written(node), Tensor | tuple | list):
            continue
        written = _write(lowering, node, known)
        if written is None:
            missing.append(node)
            written = tuple(builder.unique(node.name) for _ in range(result_count(node)))
            written = written[0] if isinstance(node.meta["val"], Tensor) else written
        lowering.values[node] = written
    outputs = [_output(lowering, node, name) for node, name in zip(results, names, strict=True)]
    lowering.weights.write()
    values = {lowering.values.get(node): leading.get(node.name) for node in qdq.graph.nodes}
    called = {value: name for value, name in values.items() if isinstance(value, str) and name is not None}
    return builder.model(inputs, outputs, "fxquant", {**called, **labels}), tuple(lowering.unpacked), missing


def _written(node: Node) -> object:
    """Return the traced value of a node; sizes are written only where something reads them."""
    if "val" not in node.meta:
        raise LoweringError(f"node {node.name!r} has no traced value; capture the model with fxquant.capture")
    return node.meta["val"]


def _write(lowering: Lowering, node: Node, known: dict[Node, Piece]) -> str | tuple[str, ...] | None:
    # The exporter writes complex numbers as pairs along one axis more, of which the tables know nothing.
    emitter = None if any(map(_is_complex, (node, *node.all_input_nodes))) else EMITTERS.get(node.target)
    try:
        written = emitter(lowering, node) if emitter is not None else None
    except (TypeError, AssertionError):
        if not any(is_size(source) for source in node.all_input_nodes):
            raise
        # An argument that is a number elsewhere depends on the input here; the exporter says whether it can be written.
        written = None
    if written is None and node in known:
        return insert(lowering, node, known[node])
    if written is None and node.op != "call_function":
        raise LoweringError(f"node {node.name!r} is a {node.op} of {node.target}; only ATen ops can be written")
    return written


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _output(lowering: Lowering, node: Node, name: str) -> onnx.ValueInfoProto:
    """Name the graph's result; inputs, constants and results returned twice keep theirs and are copied."""
    value, builder = lowering.value(node), lowering.builder
    if not builder.rename(value, name):
        builder.nodes.append(helper.make_node("Identity", [builder.named(value)], [name]))
    return value_info(node, name)


def export_onnx(
    module: GraphModule, path: Path, metadata: Mapping[str, str] | None = None, options: OnnxOptions | None = None
) -> ExportReport:
    """Write a simulated or float graph as ONNX; nothing is left behind on failure.

    Args:
        module: ATen graph with traced shapes; it is not changed.
        path: the file to write.
        metadata: texts kept in the file's `metadata_props`.
        options: None for the defaults.

    Raises:
        LoweringError: an op has no ONNX form, the checker of onnx refuses the model, or the file does not answer as
            PyTorch does at other sizes of its free axes.
        OptionError: `options.weight_only` names a layer that cannot have it.
        OutputError: the folder cannot be written.
    """
    given = options or OnnxOptions()
    model, weight_only, unpacked = _model(module, metadata or {}, given)
    counts = Counter(str(node.op_type) for node in model.graph.node)
    size = write_model(model, path, given, lambda file: check_sizes(module, file, given.runtime == "onnxruntime"))
    return ExportReport(path, size, int(model.opset_import[0].version), dict(counts), weight_only, unpacked)
