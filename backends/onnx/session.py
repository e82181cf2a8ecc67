"""ONNX Runtime sessions, and what its optimizer made of a model."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from fxquant.core.errors import FileFormatError, LoweringError, OptionError

QUIET = 4
"""Log level of ONNX Runtime that leaves only fatal messages; failures are raised anyway."""
LAYER_OPS = frozenset({"Conv", "Gemm", "MatMul", "ConvTranspose"})
INTEGER_LAYERS = frozenset({"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulNBits"})
"""Operators that multiply integers; the fused forms of MatMulInteger (ToFloat) count as well."""
FLOAT_LAYERS = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose"})
INTEGER_PREFIXES = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QAttention")
"""How the names of operators that compute on integers begin."""
MOVES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Identity", "Clip", "Pad"})
MOVES |= {
    "Slice",
    "Split",
    "Gather",
    "Concat",
    "Tile",
    "SpaceToDepth",
    "DepthToSpace",
    "MaxPool",
    "NhwcMaxPool",
    "Resize",
}
"""Operators that hand integers on without computing new ones."""


@dataclass(frozen=True)
class KernelReport:
    """What ONNX Runtime runs, read from its optimized graph.

    Args:
        kernels: layer with constant weights, by module path -> the operator that runs it, `float` where none of the
            integer operators does.
        operators: operator -> number of nodes in the optimized graph.
        stray: QuantizeLinear and DequantizeLinear that no border needs, see `stray_conversions`.

    Raises:
        OptionError: the graph is empty.
    """

    kernels: dict[str, str]
    operators: dict[str, int]
    stray: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.operators:
            raise OptionError("the optimized graph has no nodes")

    @property
    def integer_share(self) -> float:
        """Share of layers with constant weights that run on integers, 0..1; 1 without such layers."""
        return 1.0 - len(self.float_layers) / len(self.kernels) if self.kernels else 1.0

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Names of layers with constant weights that run in float."""
        return tuple(name for name, kernel in self.kernels.items() if kernel == "float")

    @property
    def float_products(self) -> int:
        """Float convolutions and matrix products left, those of two activations included."""
        return sum(count for operator, count in self.operators.items() if operator in FLOAT_LAYERS)

    @property
    def conversions(self) -> int:
        """QuantizeLinear and DequantizeLinear left: borders between integers and float."""
        return sum(self.operators.get(operator, 0) for operator in ("QuantizeLinear", "DequantizeLinear"))


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Return quiet options.

    Args:
        threads: threads inside an operator, None for the runtime's default.

    Raises:
        OptionError: fewer than one thread.
    """
    if threads is not None and threads < 1:
        raise OptionError(f"threads={threads} is out of range; give 1 or more, or None")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = threads or 0
    # Threads that still spin after a run take the cores from whatever runs next: the other session of a comparison.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_session(model: Path | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Load a model on the CPU; one with external weights only from its path.

    Raises:
        LoweringError: ONNX Runtime refuses it.
    """
    try:
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # The runtime raises a dozen classes without a common base of their own.
        raise LoweringError(f"ONNX Runtime cannot load the model: {str(error)[:300]}") from error


def executable(model: Path | bytes, threads: int | None = None) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """Return a function that runs a model and gives its first output as float32.

    Raises:
        LoweringError: ONNX Runtime refuses the model.
    """
    session = open_session(model, session_options(threads))
    names = [entry.name for entry in session.get_inputs()]
    first = session.get_outputs()[0].name

    def run(tensors: tuple[Tensor, ...]) -> Tensor:
        arrays = {n: t.detach().cpu().contiguous().numpy() for n, t in zip(names, tensors, strict=True)}
        return torch.from_numpy(np.asarray(session.run([first], arrays)[0])).float()

    return run


def kernel_report(model: Path | bytes) -> KernelReport:
    """Return which kernels ONNX Runtime chose for a model.

    Raises:
        FileFormatError: the file cannot be read.
        LoweringError: ONNX Runtime refuses the model.
    """
    try:
        data = model if isinstance(model, bytes) else model.read_bytes()
        original = onnx.load_model_from_string(data)
    except OSError as error:
        raise FileFormatError(f"cannot read {model!s}: {error.strerror or error}") from error
    except Exception as error:
        # protobuf raises its own DecodeError, from a package that is not ours to import.
        raise FileFormatError(f"{model!s:.100} is not an ONNX model ({error})") from error
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        options = session_options(1)
        options.optimized_model_filepath = str(target)
        open_session(model, options)
        optimized = onnx.load_model(target, load_external_data=False)
    nodes = all_nodes(optimized.graph)
    integer = [node for node in nodes if _is_integer(node.op_type)]
    ran, runs = ({_layer(n.name): str(n.op_type) for n in integer}, Counter(_layer(n.name) for n in integer))
    layers = Counter(node.name for node in all_nodes(original.graph) if node.name and node.op_type in LAYER_OPS)
    operators = Counter(str(node.op_type) for node in nodes)
    # A layer that two branches of a file hold counts as float unless both run it on integers.
    kernels = {name: ran[name] if runs[name] >= count else "float" for name, count in layers.items()}
    return KernelReport(kernels, dict(operators), stray_conversions(optimized.graph))


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes of a graph and of the graphs in their attributes."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *(node for each in inner for node in all_nodes(each))]


def stray_conversions(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Return the outputs of QuantizeLinear and DequantizeLinear nodes that are no border between integers and float.

    A border is a QuantizeLinear whose integers reach an integer operator or an output of the graph, and whose floats do
    not come from a DequantizeLinear; or a DequantizeLinear whose integers come from an integer operator or an input of
    the graph. Operators that only move values are looked through. Nodes must be in an order they can run in.
    """
    ends, starts = {entry.name for entry in graph.output}, {entry.name for entry in graph.input}
    # One walk each way, for what is looked through may branch and join as often as a file likes.
    made, read = dict[str, frozenset[str]](), dict[str, frozenset[str]]()

    def sources(name: str) -> frozenset[str]:
        return made.get(name, frozenset({"input" if name in starts else "constant"}))

    def targets(name: str) -> frozenset[str]:
        return read.get(name, frozenset()) | ({"output"} if name in ends else frozenset())

    for node in graph.node:
        own = sources(node.input[0]) if node.op_type in MOVES and node.input else frozenset({str(node.op_type)})
        made |= dict.fromkeys(node.output, own)
    for node in reversed(graph.node):
        moved = frozenset[str]().union(*map(targets, node.output))
        own = moved if node.op_type in MOVES else frozenset({str(node.op_type)})
        for name in node.input:
            read[name] = read.get(name, frozenset()) | own

    found = []
    for node in graph.node:
        before, behind = sources(node.input[0]) if node.input else frozenset[str](), targets(node.output[0])
        if node.op_type == "QuantizeLinear":
            border = any(_computes_on_integers(o) or o == "output" for o in behind) and "DequantizeLinear" not in before
        elif node.op_type == "DequantizeLinear":
            border = any(_computes_on_integers(o) or o == "input" for o in before)
        else:
            continue
        found += [] if border else [str(node.output[0])]
    return tuple(found)


def _computes_on_integers(operator: str) -> bool:
    return operator.startswith(INTEGER_PREFIXES)


def _is_integer(operator: str) -> bool:
    return operator in INTEGER_LAYERS or operator.startswith("MatMulInteger")


def _layer(name: str) -> str:
    """Return the original name of a node that the runtime renamed by appending to it."""
    return re.sub(r"(_token_\d+|[_/]MatMulAddFusion|_nchwc|_quant|_nhwc)*$", "", name)
