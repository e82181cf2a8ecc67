"""Builds an ONNX graph: unique names, shared constants, weights packed below a byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

Array = NDArray[Any]

OPSET = 20
"""Lowest operator set with every operator written here (Gelu is the newest)."""
PACKED = {4: (TensorProto.INT4, 21), 2: (TensorProto.INT2, 25)}
"""Stored bits -> ONNX type and the first operator set that has it."""


def pack(values: Array, bits: int) -> bytes:
    """Return signed integers packed little end first, `8 / bits` to the byte, the last byte filled with zeros."""
    per_byte = 8 // bits
    flat = values.astype(np.int8).reshape(-1).astype(np.uint8) & ((1 << bits) - 1)
    flat = np.concatenate([flat, np.zeros(-len(flat) % per_byte, np.uint8)]).reshape(-1, per_byte)
    packed = np.zeros(len(flat), np.uint8)
    for position in range(per_byte):
        packed |= flat[:, position] << np.uint8(bits * position)
    return packed.tobytes()


class GraphBuilder:
    """Collects the nodes and constants of one graph."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._names: set[str] = set()
        self._constants: dict[tuple[str, tuple[int, ...], bytes, int], str] = {}
        self._renamed: dict[str, str] = {}

    def unique(self, name: str) -> str:
        """Reserve and return `name`, numbered if it is taken."""
        free, number = name, 1
        while free in self._names:
            number += 1
            free = f"{name}_{number}"
        self._names.add(free)
        return free

    def constant(self, array: Array, name: str, bits: int = 0) -> str:
        """Return the name of a constant of this content; equal content is stored once.

        Args:
            array: the values.
            name: wished for; taken if the content is new.
            bits: 4 or 2 stores int8 values packed; anything else stores the array as it is.
        """
        # A scalar must stay a scalar: ascontiguousarray would make it a vector of one.
        array = array if array.ndim == 0 else np.ascontiguousarray(array)
        key = (array.dtype.str, array.shape, array.tobytes(), bits)
        if key not in self._constants:
            self._constants[key] = self.unique(name)
            self.initializers.append(self._tensor(array, self._constants[key], bits))
        return self._constants[key]

    def _tensor(self, array: Array, name: str, bits: int) -> onnx.TensorProto:
        if bits not in PACKED:
            return onnx.numpy_helper.from_array(array, name)
        return helper.make_tensor(name, PACKED[bits][0], array.shape, pack(array, bits), raw=True)

    def node(self, op: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the name its output got."""
        result = self.unique(output)
        self.nodes.append(helper.make_node(op, inputs, [result], name=name or None, **attributes))
        return result

    def rename(self, old: str, new: str) -> bool:
        """Give a computed value another name; return whether there is such a value, not renamed before."""
        if not any(old in node.output for node in self.nodes):
            return False
        self._renamed[old] = new
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == old:
                        names[index] = new
        return True

    def named(self, value: str) -> str:
        """Return what a value is called since it was renamed."""
        return self._renamed.get(value, value)

    def model(
        self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto], name: str
    ) -> onnx.ModelProto:
        """Return the finished model; constants that nothing reads are left out."""
        read = {value for node in self.nodes for value in node.input}
        used = [tensor for tensor in self.initializers if tensor.name in read]
        graph = helper.make_graph(self.nodes, name, inputs, outputs, used)
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(graph, producer_name="fxquant", opset_imports=[opset])
        # onnx would write its own newest file version, which runtimes refuse.
        model.ir_version = helper.find_min_ir_version_for([opset])
        return model
