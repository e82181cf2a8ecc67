"""A simulated or float graph in, a standard ONNX QDQ model out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxquant.backends.explicit_graph import to_qdq
from fxquant.backends.onnx.blocks import block_linear, to_blocks
from fxquant.backends.onnx.builder import OPSET, PACKED, GraphBuilder
from fxquant.backends.onnx.export_options import OnnxOptions
from fxquant.backends.onnx.lowering import Lowering, dims
from fxquant.backends.onnx.model_file import write_model
from fxquant.backends.onnx.openvino import add_biases, readable_storage
from fxquant.backends.onnx.rewrites import fuse_integers
from fxquant.backends.onnx.shape_emitters import EMITTERS
from fxquant.backends.onnx.splice import Piece, insert, pieces, result_count
from fxquant.backends.onnx.stem import fold_stems
from fxquant.backends.qdq_ops import dequantize_channels
from fxquant.backends.reference import STORAGE_BITS
from fxquant.core.errors import LoweringError, OptionError

LAZY = (dequantize_channels, torch.ops.aten.sym_size.int)


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Args:
        path: the file.
        bytes: its size on disk, that of its external weights included.
        opset: operator set of the file.
        nodes: ONNX op -> number of nodes.
        weight_only: layers with one weight scale per block, which multiply floats.

    Raises:
        OptionError: an empty file.
    """

    path: Path
    bytes: int
    opset: int
    nodes: dict[str, int]
    weight_only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bytes <= 0 or not self.nodes:
            raise OptionError(f"{self.path} holds no model")


def to_onnx(
    module: GraphModule,
    metadata: Mapping[str, str] | None = None,
    storage_bits: Mapping[int, int] = STORAGE_BITS,
    options: OnnxOptions | None = None,
) -> onnx.ModelProto:
    """Return the ONNX model of a simulated or float graph.

    Args:
        module: ATen graph with traced shapes, FakeQuantize modules where it is quantized; it is not changed.
        metadata: texts kept in the file, for example the plan.
        storage_bits: bits of a weight's grid -> bits it is stored in: 2, 4 or 8.
        options: None for the defaults.

    Raises:
        LoweringError: an op has no ONNX form.
        OptionError: `options.weight_only` names a layer that cannot have it.
    """
    return _model(module, metadata or {}, dict(storage_bits), options or OnnxOptions())[0]


def _model(
    module: GraphModule, metadata: Mapping[str, str], storage: dict[int, int], options: OnnxOptions
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return the model, and the layers on blocks."""
    blocks, weight_only = to_blocks(module, options.weight_only, options.block_size)
    # OpenVINO computes a layer in float where a reshape separates it from a residual sum.
    for_openvino = options.runtime == "openvino"
    qdq = fuse_integers(to_qdq(blocks), matrices=not for_openvino)
    if for_openvino:
        qdq, storage = add_biases(qdq), readable_storage(storage)
    else:
        qdq = fold_stems(qdq)
    known: dict[Node, Piece] = {}
    # Shared zero-points, which ONNX Runtime must have, keep OpenVINO from integers in layers of one width.
    model, missing = _attempt(qdq, storage, known, not for_openvino)
    if missing:
        known = pieces(qdq, missing, int(model.opset_import[0].version))
        model, _ = _attempt(qdq, storage, known, not for_openvino)
    for key, text in metadata.items():
        model.metadata_props.add(key=key, value=text)
    return model, weight_only


def _attempt(
    qdq: GraphModule, storage: dict[int, int], known: dict[Node, Piece], weight_zeros: bool
) -> tuple[onnx.ModelProto, list[Node]]:
    """Write the graph, and return it with the nodes that neither a table nor `known` can write."""
    builder = GraphBuilder(_opset(qdq, storage))
    lowering = Lowering(qdq, builder, storage, weight_zeros)
    inputs, results, missing = [], list[Node](), list[Node]()
    for node in qdq.graph.nodes:
        if node.op == "placeholder":
            lowering.values[node] = builder.unique(node.name)
            if isinstance(node.meta.get("val"), Tensor):
                inputs.append(_value_info(node, node.name))
        elif node.op == "output":
            map_arg(node.args, results.append)
        elif node.op != "get_attr" and node.target not in LAZY and isinstance(_written(node), Tensor | tuple | list):
            written = _write(lowering, node, known)
            if written is None:
                missing.append(node)
                written = tuple(builder.unique(node.name) for _ in range(result_count(node)))
                written = written[0] if isinstance(node.meta["val"], Tensor) else written
            lowering.values[node] = written
    outputs = [_output(lowering, node, index) for index, node in enumerate(results)]
    return builder.model(inputs, outputs, "fxquant"), missing


def _written(node: Node) -> object:
    """Return the traced value of a node; sizes are written only where something reads them."""
    if "val" not in node.meta:
        raise LoweringError(f"node {node.name!r} has no traced value; capture the model with fxquant.capture")
    return node.meta["val"]


def _write(lowering: Lowering, node: Node, known: dict[Node, Piece]) -> str | tuple[str, ...] | None:
    emitter = EMITTERS.get(node.target)
    written = emitter(lowering, node) if emitter is not None else None
    if written is None and node in known:
        return insert(lowering, node, known[node])
    if written is None and node.op != "call_function":
        raise LoweringError(f"node {node.name!r} is a {node.op} of {node.target}; only ATen ops can be written")
    return written


def _opset(module: GraphModule, storage: Mapping[int, int]) -> int:
    """Return the lowest operator set that has all types in use."""
    widths = {storage.get(int(str(n.args[3])), 8) for n in module.graph.nodes if n.target is dequantize_channels}
    widths |= {storage.get(int(str(n.args[5])), 8) for n in module.graph.nodes if n.target is block_linear}
    return max([OPSET, *(PACKED[width][1] for width in widths if width in PACKED)])


def _value_info(node: Node, name: str) -> onnx.ValueInfoProto:
    called = _symbols(node.graph)
    # The leading size is the batch.
    shape = [
        size
        if isinstance(size, int)
        else "batch"
        if axis == 0
        else re.sub(r"s\d+", lambda m: called.get(m[0], m[0]), str(size))
        for axis, size in enumerate(dims(node))
    ]
    try:
        kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=node.meta["val"].dtype).numpy().dtype)
    except TypeError as error:
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        raise LoweringError(
            f"input or output {name!r} of the model is {dtype}, which the ONNX Runtime backend does not support; "
            "let the model take and return float32"
        ) from error
    return helper.make_tensor_value_info(name, kind, shape)


def _symbols(graph: Graph) -> dict[str, str]:
    """Return what torch calls free sizes (s0, s77, ...) of an image -> what they are."""
    images = [node for node in graph.nodes if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)]
    sizes = [
        zip(dims(node), ("batch", "channels", "height", "width"), strict=True)
        for node in images
        if len(dims(node)) == 4
    ]
    return {str(size): word for pairs in reversed(sizes) for size, word in pairs if not isinstance(size, int)}


def _output(lowering: Lowering, node: Node, index: int) -> onnx.ValueInfoProto:
    """Name the graph's result; inputs, constants and results returned twice keep theirs and are copied."""
    value, builder = lowering.value(node), lowering.builder
    name = builder.unique("output" if index == 0 else f"output_{index}")
    if not builder.rename(value, name):
        builder.nodes.append(helper.make_node("Identity", [builder.named(value)], [name]))
    return _value_info(node, name)


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
        LoweringError: an op has no ONNX form, or the checker of onnx refuses the model.
        OptionError: `options.weight_only` names a layer that cannot have it.
        OutputError: the folder cannot be written.
    """
    given = options or OnnxOptions()
    model, weight_only = _model(module, metadata or {}, dict(STORAGE_BITS), given)
    counts = Counter(str(node.op_type) for node in model.graph.node)
    size = write_model(model, path, given)
    return ExportReport(path, size, int(model.opset_import[0].version), dict(counts), weight_only)
