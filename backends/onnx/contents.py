"""What any ONNX file holds: operators, stored types, and what ONNX Runtime would run in integers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from onnx import AttributeProto, TensorProto

from fxquant.backends.onnx.origins import WIDTHS, Origin, Origins, type_name, width_of
from fxquant.backends.onnx.session import kernel_report
from fxquant.core.errors import FileFormatError, FxquantError, OptionError, first_line

LARGEST = 2**31 - 1
"""Bytes that a protobuf message may have."""

PLAIN = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
"""Standard operator with a weight -> the input that holds it; ONNX Runtime makes integer kernels of some of them."""
INTEGER = {"QLinearConv": 3, "ConvInteger": 1, "QLinearMatMul": 3, "MatMulInteger": 1, "QGemm": 3}
INTEGER |= {"MatMulNBits": 1, "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1, "QAttention": 1}
"""Operator that computes on integers by itself -> the input that holds its weight."""
FLOAT = {"LSTM": 1, "GRU": 1, "RNN": 1, "Attention": 1, "FusedConv": 1, "FusedGemm": 1, "FusedMatMul": 1}
"""Operator with a weight that has no integer form here -> the input that holds it."""
CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
EXTERNAL = "weights are in external files"


@dataclass(frozen=True)
class Value:
    """An input or output of the model: its name, element type, and shape as text."""

    name: str
    type: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """Initializers of one element type: how many tensors, elements, and bytes of them."""

    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Layer:
    """One operator with a weight.

    Args:
        name: its name in the file, made up where it has none.
        operator: for example `Conv`.
        weight: element type its weight is meant in, for example `INT4`; `INT2.4` where one takes so many bits.
        activation: element type of the integers it reads, None where it reads floats.
        kernel: operator that ONNX Runtime runs, `float` where none of the integer ones does; None if it was not asked.
        reason: why it runs, or would run, in float; None where it does not.
    """

    name: str
    operator: str
    weight: str
    activation: str | None
    kernel: str | None
    reason: str | None


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Args:
        bytes: size of the file.
        ir_version: version of the ONNX format.
        opsets: domain -> version of its operators; the standard domain is called `ai.onnx`.
        producer: who wrote it.
        inputs: what the model takes.
        outputs: what it gives.
        operators: operator -> precision -> number of nodes, branches and functions included.
        stored: element type -> initializers of that type.
        layers: operators with a weight, in the order of the file.
        metadata: texts that came with the file.
        notes: what could not be found out, and why.

    Raises:
        OptionError: a file without size.
    """

    bytes: int
    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operators: dict[str, dict[str, int]]
    stored: dict[str, Stored]
    layers: tuple[Layer, ...]
    metadata: dict[str, str]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.bytes <= 0:
            raise OptionError("an empty file holds no model")


def inspect_onnx(path: Path, runtime: bool = True) -> Inspection:
    """Read a file; nothing in it is run but by ONNX Runtime's optimizer.

    Args:
        path: the file.
        runtime: ask ONNX Runtime which kernels it takes; False only reads.

    Raises:
        FileFormatError: missing, damaged, too large, or no ONNX model.
    """
    data = _bytes(path)
    try:
        model = onnx.load_model_from_string(data)
        if not model.HasField("graph") or not (model.graph.node or model.graph.initializer):
            raise FileFormatError(f"{path} holds no graph; give an ONNX model")
        return _inspected(model, len(data), runtime)
    except FxquantError:
        raise
    except Exception as error:
        # protobuf raises its own DecodeError, from a package that is not ours to import; texts may not be UTF-8.
        raise FileFormatError(
            f"{path} is not an intact ONNX model ({first_line(error, 300)}); export it again"
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise FileFormatError(f"cannot read {path}: {'it is no plain file' if path.exists() else 'no such file'}")
        size = path.stat().st_size
        if size > LARGEST:
            raise FileFormatError(
                f"{path} has {size} bytes; an ONNX file has at most {LARGEST}, so keep its weights in external files"
            )
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise FileFormatError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not data:
        raise FileFormatError(f"{path} is empty; export it again")
    return data


def _inspected(model: onnx.ModelProto, size: int, runtime: bool) -> Inspection:
    graph, notes = model.graph, list[str]()
    stored = _stored(model, notes)
    # The runtime appends to names when it fuses; nodes without one, or with one that others have, could not be found.
    names = _rename(graph)
    operators: dict[str, dict[str, int]] = {}
    found: list[tuple[str, Layer]] = []
    for node, origins in _nodes(model):
        layer = _layer(node, origins, names)
        if layer is not None:
            found.append((node.name, layer))
        counts = operators.setdefault(node.op_type, {})
        precision = _precision(node, origins, layer)
        counts[precision] = counts.get(precision, 0) + 1
    kernels: dict[str, str] = {}
    if runtime and any(key in names for key, _ in found):
        kernels = _kernels(model, notes)
    layers = tuple(_with_kernel(layer, kernels.get(key), notes) for key, layer in found)
    initial = {tensor.name for tensor in graph.initializer}
    return Inspection(
        bytes=size,
        ir_version=int(model.ir_version),
        opsets={entry.domain or "ai.onnx": int(entry.version) for entry in model.opset_import},
        producer=" ".join(part for part in (model.producer_name, model.producer_version) if part),
        inputs=tuple(_value(entry) for entry in graph.input if entry.name not in initial),
        outputs=tuple(_value(entry) for entry in graph.output),
        operators=dict(sorted(operators.items())),
        stored=stored,
        layers=layers,
        metadata={entry.key: entry.value for entry in model.metadata_props},
        notes=tuple(notes),
    )


def _rename(graph: onnx.GraphProto) -> dict[str, str]:
    """Give the plain layers names of their own and return each with the one it had."""
    names: dict[str, str] = {}
    for index, node in enumerate(graph.node):
        if node.op_type in PLAIN:
            names[f"layer{index}"] = node.name or f"{node.op_type} {index}"
            node.name = f"layer{index}"
    return names


def _graphs(model: onnx.ModelProto) -> Iterator[tuple[Sequence[onnx.NodeProto], onnx.GraphProto | None, Origins]]:
    """Yield the nodes of the graph, of its branches and of functions, each with its graph and what answers for it."""
    waiting: list[tuple[onnx.GraphProto, Origins | None]] = [(model.graph, None)]
    while waiting:
        graph, outer = waiting.pop()
        origins = Origins(graph.node, graph.initializer, outer)
        yield graph.node, graph, origins
        waiting += [(inner, origins) for node in graph.node for inner in _branches(node)]
    for function in model.functions:
        yield function.node, None, Origins(function.node)


def _branches(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for a in node.attribute for g in ([a.g] if a.type == AttributeProto.GRAPH else a.graphs)]


def _nodes(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, Origins]]:
    for nodes, _, origins in _graphs(model):
        for node in nodes:
            yield node, origins


def _stored(model: onnx.ModelProto, notes: list[str]) -> dict[str, Stored]:
    """Return what is stored by element type, largest first, and note what is not in the file or does not fit."""
    found: dict[str, Stored] = {}
    external: set[str] = set()
    for nodes, graph, _ in _graphs(model):
        tensors = [a.t for n in nodes if n.op_type == "Constant" for a in n.attribute if a.HasField("t")]
        if graph is not None:
            tensors += [*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)]
        for tensor in tensors:
            kind = type_name(tensor.data_type)
            if any(size < 0 for size in tensor.dims):
                notes.append(f"initializer {tensor.name!r} has a negative size; it is not counted")
                continue
            elements, kept = math.prod(tensor.dims), len(tensor.raw_data)
            taken = sum(map(len, tensor.string_data)) if kind == "STRING" else -(-elements * WIDTHS.get(kind, 32) // 8)
            if tensor.data_location == TensorProto.EXTERNAL:
                external.add(next((entry.value for entry in tensor.external_data if entry.key == "location"), "?"))
            elif kept and kept != taken:
                notes.append(f"initializer {tensor.name!r} holds {kept} bytes where its shape needs {taken}")
            before = found.get(kind, Stored(0, 0, 0))
            found[kind] = Stored(before.tensors + 1, before.elements + elements, before.bytes + taken)
    if external:
        notes.append(f"{EXTERNAL}: {len(external)}, for example {min(external)!r}")
    return dict(sorted(found.items(), key=lambda item: (-item[1].bytes, item[0])))


def _layer(node: onnx.NodeProto, origins: Origins, names: Mapping[str, str]) -> Layer | None:
    """Return a node as a layer, None where no input of it is a weight."""
    slot = {**PLAIN, **INTEGER, **FLOAT}.get(node.op_type)
    if slot is None or len(node.input) <= slot:
        return None
    # A matrix product may have its weight on either side.
    slots = (1, 0) if node.op_type in ("MatMul", "Gemm") else (slot,)
    place = next((k for k in slots if origins.of(node.input[k]).stored is not None), None)
    if place is None:
        return None
    weight, read = origins.of(node.input[place]), origins.of(node.input[1 - place if len(slots) == 2 else 0])
    name, stored = names.get(node.name, node.name) or node.op_type, weight.quantized or weight.stored or "?"
    if node.op_type in INTEGER:
        return Layer(name, node.op_type, stored, "UINT8", node.op_type, None)
    if node.op_type in FLOAT:
        return Layer(name, node.op_type, stored, read.quantized, "float", f"{node.op_type} has no integer form here")
    reason = _why_float(node, weight, read, origins)
    if node.name not in names:
        reason = reason or "it is inside a branch or a function, where ONNX Runtime's kernels are not looked at"
    return Layer(name, node.op_type, stored, read.quantized, None, reason)


def _why_float(node: onnx.NodeProto, weight: Origin, read: Origin, origins: Origins) -> str | None:
    """Return what in the file keeps ONNX Runtime from integers, None where nothing does."""
    operator = node.op_type
    if weight.quantized is None:
        return f"its weights are {weight.stored}"
    if read.quantized is None:
        return "its input is not quantized"
    if operator == "ConvTranspose":
        return "ONNX Runtime has no integer ConvTranspose"
    if weight.blocks:
        return "its weights have a scale for each block, which are unpacked to floats"
    if weight.bits < 8 and not weight.cast:
        return (
            f"{weight.quantized} weights have no {operator} kernel; a Cast to INT8 before DequantizeLinear gives them"
        )
    if operator == "Conv" and not origins.quantized_next(node.output[0]):
        return "its output is not quantized, and an integer convolution writes integers"
    return None


def _precision(node: onnx.NodeProto, origins: Origins, layer: Layer | None) -> str:
    """Return `W4A8`, `float`, `integer`, `quantized` (reads dequantized values), `conversion` or `other`."""
    if node.op_type in INTEGER or node.op_type.startswith("QLinear"):
        return "integer"
    if layer is not None:
        if "INT" not in layer.weight:
            # With float weights it multiplies floats, whatever its input was rounded to.
            return "float"
        read = 32 if layer.activation is None else WIDTHS.get(layer.activation, 8)
        return f"W{width_of(layer.weight):g}A{read}"
    if node.op_type in CONVERSIONS:
        return "conversion"
    inputs = [origins.of(name) for name in node.input if name]
    computed = [origin for origin in inputs if origin.stored is None]
    return "quantized" if computed and all(origin.quantized for origin in computed) else "other"


def _kernels(model: onnx.ModelProto, notes: list[str]) -> dict[str, str]:
    """Return renamed layer -> kernel, nothing with a note where ONNX Runtime cannot say."""
    if any(note.startswith(EXTERNAL) for note in notes):
        notes.append("ONNX Runtime was not asked for kernels: the weights are in other files")
        return {}
    data = model.SerializeToString()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The runtime is less careful with damaged graphs than the checker is.
            onnx.checker.check_model(data)
        report = kernel_report(data)
    except onnx.checker.ValidationError as error:
        notes.append(f"ONNX Runtime was not asked for kernels: the model is not valid ({first_line(error, 300)})")
    except FxquantError as error:
        notes.append(f"ONNX Runtime could not be asked for kernels: {first_line(error, 300)}")
    else:
        return report.kernels
    return {}


def _with_kernel(layer: Layer, kernel: str | None, notes: list[str]) -> Layer:
    if kernel is None:
        return layer
    if kernel == "float":
        return replace(layer, kernel=kernel, reason=layer.reason or "ONNX Runtime made no integer kernel of it")
    if layer.reason is not None:
        notes.append(f"ONNX Runtime runs {layer.name!r} as {kernel}, although in the file {layer.reason}")
    return replace(layer, kernel=kernel, reason=None)


def _value(entry: onnx.ValueInfoProto) -> Value:
    kind = entry.type.WhichOneof("value") or "unknown"
    if kind != "tensor_type":
        return Value(entry.name, kind.removesuffix("_type"), ())
    tensor = entry.type.tensor_type
    sizes = (s.dim_param or "?" if s.WhichOneof("value") != "dim_value" else str(s.dim_value) for s in tensor.shape.dim)
    return Value(entry.name, type_name(tensor.elem_type), tuple(sizes))
