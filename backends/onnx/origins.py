"""Where the inputs of an ONNX node come from: which type weights are stored in, and what is quantized."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from fxquant.backends.onnx.builder import Array
from fxquant.backends.onnx.stored_widths import StoredWidths

_BY_WIDTH = {
    2: "INT2 UINT2",
    4: "INT4 UINT4 FLOAT4E2M1",
    6: "FLOAT6E2M3 FLOAT6E3M2",
    8: "INT8 UINT8 BOOL FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E8M0",
    16: "FLOAT16 BFLOAT16 INT16 UINT16",
    32: "FLOAT INT32 UINT32",
    64: "DOUBLE INT64 UINT64 COMPLEX64",
    128: "COMPLEX128",
}
WIDTHS = {name: bits for bits, names in _BY_WIDTH.items() for name in names.split()}
"""Name of an element type -> its bits; texts have none."""

PASSES_ON = frozenset({"Cast", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators behind which a weight is still the same weight."""

CONSTANTS = frozenset({"Constant", "ConstantOfShape"})
"""Operators that stand for a stored value."""

CLIPS = frozenset({"Relu", "Clip"})
"""Operators that the saturation of a quantizer behind them can do as well."""

MOST = 1 << 16
"""Numbers of a constant that says how another is shaped or cut, at most."""

STEPS = 16
"""Operators between an initializer and the op that uses it at most; a damaged file may hold a circle."""


@dataclass(frozen=True)
class Origin:
    """Where the value of one input of a node comes from.

    Args:
        stored: element type of the initializer, None where the value is computed; `INT3` or `INT1.6` for integers that
            are unpacked, by the bits that one takes in the file.
        quantized: element type of the integers it is dequantized from, None where there are none.
        cast: whether the integers pass a Cast, or are unpacked, before they are dequantized.
        blocks: whether there is one scale for each block of values.
    """

    stored: str | None
    quantized: str | None
    cast: bool = False
    blocks: bool = False

    @property
    def bits(self) -> float:
        """Width of the values as the file means them, 32 where they are float32."""
        return width_of(self.quantized or self.stored or "FLOAT")


class Origins:
    """Answers for the values of one graph.

    Args:
        nodes: its nodes.
        initializers: what is stored with it.
        outer: the graph around it, whose values it may read.
    """

    def __init__(
        self, nodes: Iterable[onnx.NodeProto], initializers: Iterable[TensorProto] = (), outer: Origins | None = None
    ) -> None:
        self._outer = outer
        self._made: dict[str, onnx.NodeProto] = {}
        self._read: dict[str, list[onnx.NodeProto]] = {}
        tensors = {tensor.name: tensor for tensor in initializers}
        for node in nodes:
            self._made |= {name: node for name in node.output if name}
            for name in node.input:
                self._read.setdefault(name, []).append(node)
            if node.op_type in CONSTANTS:
                kept = [a.t for a in node.attribute if a.name == "value" and a.HasField("t")]
                tensors |= dict.fromkeys(node.output[:1], kept[0] if kept else TensorProto(data_type=TensorProto.FLOAT))
        self._stored = {name: type_name(tensor.data_type) for name, tensor in tensors.items()}
        sizes = {name: (tuple(t.dims), WIDTHS.get(self._stored[name], 32)) for name, t in tensors.items()}
        self._widths = StoredWidths(self._made, sizes, lambda name: _numbers(tensors[name]))

    def quantized_next(self, name: str) -> bool:
        """Whether something quantizes a value, behind a clip at most."""
        for node in self._read.get(name, []):
            if node.op_type == "QuantizeLinear":
                return True
            if node.op_type in CLIPS and any(r.op_type == "QuantizeLinear" for r in self._read.get(node.output[0], [])):
                return True
        return False

    def of(self, name: str) -> Origin:
        """Return where a value comes from."""
        quantized: str | None = None
        dequantized = cast = blocks = False
        for _ in range(STEPS):
            stored = self._stored_type(name)
            if stored is not None:
                return Origin(stored, quantized or (stored if dequantized else None), cast, blocks)
            node = self._maker(name)
            if node is None or not node.input:
                break
            if node.op_type == "DequantizeLinear" and not dequantized:
                dequantized = True
                blocks = any(a.name == "block_size" and a.i > 0 for a in node.attribute)
                # Of integers that are cast or unpacked the file stores others, which are what it means.
                quantized = None if self._is_unpacked(node.input[0]) else self._grid(node)
            elif node.op_type == "Mul" and not dequantized and self._casts(node.input[0]):
                # A weight that is stored as integers and made float when the file is loaded.
                dequantized = True
            elif node.op_type == "QuantizeLinear" and dequantized:
                quantized = self._grid(node)
            elif node.op_type not in PASSES_ON:
                width = self._widths.of(name) if dequantized else None
                if width is None:
                    break
                unpacked = f"INT{round(width, 2):g}"
                return Origin(unpacked, quantized or unpacked, True, blocks)
            cast = cast or (node.op_type == "Cast" and dequantized)
            name = node.input[0]
        return Origin(None, (quantized or "UINT8") if dequantized else None, cast, blocks)

    def _casts(self, name: str) -> bool:
        node = self._maker(name)
        return node is not None and node.op_type == "Cast"

    def _maker(self, name: str) -> onnx.NodeProto | None:
        if name in self._made or self._outer is None:
            return self._made.get(name)
        return self._outer._maker(name)

    def _stored_type(self, name: str) -> str | None:
        if name in self._stored or name in self._made or self._outer is None:
            return self._stored.get(name)
        return self._outer._stored_type(name)

    def _is_unpacked(self, name: str) -> bool:
        node = self._maker(name)
        return node is not None and (node.op_type == "Cast" or self._widths.of(name) is not None)

    def _grid(self, node: onnx.NodeProto) -> str | None:
        """Return the integers of a QuantizeLinear or DequantizeLinear, None where it does not say."""
        point = self._stored_type(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        asked = next((a.i for a in node.attribute if a.name == "output_dtype" and a.i), None)
        if point is not None or node.op_type == "DequantizeLinear":
            return point
        return "UINT8" if asked is None else type_name(asked)


def width_of(name: str) -> float:
    """Return the bits of an element type by its name, `INT2.4` for what is unpacked included; 32 for an unknown one."""
    digits = name.removeprefix("INT")
    if name not in WIDTHS and digits != name and digits.replace(".", "", 1).isdigit():
        return float(digits)
    return WIDTHS.get(name, 32)


def _numbers(tensor: TensorProto) -> Array:
    if math.prod(tensor.dims) > MOST:
        raise ValueError(f"{tensor.name!r} has too many numbers for a shape")
    return onnx.numpy_helper.to_array(tensor)


def type_name(code: int) -> str:
    """Return the name of an ONNX type number, for example `INT4`; `type 99` for an unknown one."""
    known: Iterable[tuple[str, int]] = TensorProto.DataType.items()
    return next((name for name, value in known if value == code), f"type {code}")
