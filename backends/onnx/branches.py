"""Two simulated graphs and a router as one ONNX model: `If` runs one of them for each patch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch.fx import GraphModule

from fxquant.backends.onnx.export import ExportReport, to_onnx
from fxquant.backends.onnx.export_options import OnnxOptions
from fxquant.backends.onnx.model_file import write_model
from fxquant.backends.onnx.session import all_nodes, open_session, session_options
from fxquant.core.errors import LoweringError

HARD, EASY, SHARED, ROUTE = "h_", "e_", "s_", "r_"
"""What names of values begin with: those of a branch, weights that both have, and the router's. Short, for a file holds
each many times."""
IMAGE = "patch_router"
"""Key of the metadata that says that the file holds a router, and its threshold."""
REDUCE_OPSET = 18
"""First operator set whose ReduceMean takes all axes without naming them."""


def export_branches(
    hard: GraphModule,
    easy: GraphModule,
    threshold: float,
    path: Path,
    metadata: Mapping[str, str] | None = None,
    options: OnnxOptions | None = None,
) -> ExportReport:
    """Write both graphs as one ONNX file that takes one patch at a time; nothing is left behind on failure.

    Args:
        hard: simulated graph for patches whose gradient magnitude is above the threshold.
        easy: the one for all others; same input and outputs.
        threshold: in the unit of the input.
        path: the file to write.
        metadata: texts kept in the file's `metadata_props`.
        options: None for the defaults.

    Raises:
        LoweringError: an op has no ONNX form, or the checker of onnx refuses the model.
        OutputError: the folder cannot be written.
    """
    given = options or OnnxOptions()
    model = routed_model(to_onnx(hard, options=given), to_onnx(easy, options=given), threshold)
    for key, text in {IMAGE: repr(float(threshold)), **(metadata or {})}.items():
        model.metadata_props.add(key=key, value=text)
    counts = Counter(str(node.op_type) for node in all_nodes(model.graph))

    def accept(file: Path) -> None:
        if given.runtime == "onnxruntime":
            _ = open_session(file, session_options(1))

    size = write_model(model, path, given, accept)
    return ExportReport(path, size, int(model.opset_import[0].version), dict(counts))


def routed_model(hard: onnx.ModelProto, easy: onnx.ModelProto, threshold: float) -> onnx.ModelProto:
    """Return the model `If(gradient magnitude > threshold, hard, easy)`; weights that both have are in it once.

    Args:
        hard: ONNX model of one input (N, C, H, W).
        easy: another with the same input and outputs.
        threshold: what the gradient magnitude of an input (1, C, H, W) is compared with, float32.

    Raises:
        LoweringError: the two differ in their inputs or outputs, or have not one input of four axes.
    """
    image, outputs = _interface(hard, easy)
    opset = max(REDUCE_OPSET, *(int(each.opset_import[0].version) for each in (hard, easy)))
    common = _common(hard.graph, easy.graph)
    branches = [_branch(each.graph, prefix, common) for each, prefix in ((hard, HARD), (easy, EASY))]
    nodes, constants = _router(image.name, threshold)
    names = [entry.name for entry in outputs]
    nodes.append(helper.make_node("If", [f"{ROUTE}hard"], names, then_branch=branches[0], else_branch=branches[1]))
    constants += [_renamed(tensor, name) for tensor, name in common.values()]
    graph = helper.make_graph(nodes, "fxquant", [_single(image)], [_single(entry) for entry in outputs], constants)
    versions = [helper.make_opsetid("", opset)]
    known = {each.domain: each for model in (hard, easy) for each in model.opset_import if each.domain}
    model = helper.make_model(graph, producer_name="fxquant", opset_imports=[*versions, *known.values()])
    model.ir_version = max(hard.ir_version, easy.ir_version, helper.find_min_ir_version_for(versions))
    return model


def _interface(hard: onnx.ModelProto, easy: onnx.ModelProto) -> tuple[onnx.ValueInfoProto, list[onnx.ValueInfoProto]]:
    """Return the input and the outputs that both models have."""
    sides = [([e.name for e in m.graph.input], [e.name for e in m.graph.output]) for m in (hard, easy)]
    inputs = list(hard.graph.input)
    if sides[0] != sides[1] or len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        raise LoweringError(f"a routed file needs one input (N, C, H, W) and the same outputs; these have {sides}")
    return inputs[0], list(hard.graph.output)


def _single(entry: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """Return an input or output with one image along its first axis: `If` decides for a whole batch."""
    single = onnx.ValueInfoProto()
    single.CopyFrom(entry)
    if single.type.tensor_type.shape.dim:
        single.type.tensor_type.shape.dim[0].dim_value = 1
    return single


def _common(hard: onnx.GraphProto, easy: onnx.GraphProto) -> dict[bytes, tuple[onnx.TensorProto, str]]:
    """Return content -> (tensor, name in the file) of the constants that both graphs hold."""
    ours, theirs = ({_content(tensor): tensor for tensor in graph.initializer} for graph in (hard, easy))
    found = [key for key in ours if key in theirs]
    return {key: (ours[key], f"{SHARED}{number}") for number, key in enumerate(found)}


def _content(tensor: onnx.TensorProto) -> bytes:
    nameless = onnx.TensorProto()
    nameless.CopyFrom(tensor)
    nameless.ClearField("name")
    return bytes(nameless.SerializeToString(deterministic=True))


def _renamed(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _branch(
    graph: onnx.GraphProto, prefix: str, common: Mapping[bytes, tuple[onnx.TensorProto, str]]
) -> onnx.GraphProto:
    """Return a graph as a branch: it reads the input from outside, and its values have names of its own."""
    named = {entry.name: entry.name for entry in graph.input} | {"": ""}
    constants = []
    for tensor in graph.initializer:
        shared = common.get(_content(tensor))
        named[tensor.name] = f"{prefix}{tensor.name}" if shared is None else shared[1]
        if shared is None:
            constants.append(_renamed(tensor, named[tensor.name]))
    nodes = []
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for names in (copy.input, copy.output):
            names[:] = [named.setdefault(name, f"{prefix}{name}") for name in names]
        nodes.append(copy)
    outputs = []
    for entry in graph.output:
        copy = _single(entry)
        copy.name = named[entry.name]
        outputs.append(copy)
    return helper.make_graph(nodes, f"{prefix}plan", [], outputs, constants)


def _router(image: str, threshold: float) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return nodes that compare the gradient magnitude of one image with a threshold, and their constants."""
    numbers = {"zero": [0], "one": [1], "minus": [-1], "end": [np.iinfo(np.int64).max], "rows": [2], "columns": [3]}
    constants = [
        numpy_helper.from_array(np.array(value, dtype=np.int64), f"{ROUTE}{name}") for name, value in numbers.items()
    ]
    constants.append(numpy_helper.from_array(np.array(threshold, dtype=np.float32), f"{ROUTE}threshold"))
    nodes = []

    def emit(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [f"{ROUTE}{output}"], **attributes))
        return f"{ROUTE}{output}"

    means = []
    for axis in ("rows", "columns"):
        ends = {"later": ("one", "end"), "earlier": ("zero", "minus")}
        parts = [
            emit("Slice", [image, *(f"{ROUTE}{name}" for name in (*places, axis))], f"{axis}_{part}")
            for part, places in ends.items()
        ]
        change = emit("Abs", [emit("Sub", parts, f"{axis}_change")], f"{axis}_size")
        means.append(emit("ReduceMean", [change], f"{axis}_mean", keepdims=0))
    total = emit("Add", means, "gradient")
    _ = emit("Greater", [total, f"{ROUTE}threshold"], "hard")
    return nodes, constants
