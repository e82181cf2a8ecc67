"""The state of one lowering to ONNX: which FX node became which value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from fxquant.backends.onnx.builder import Array, GraphBuilder
from fxquant.backends.qdq_ops import dequantize_channels
from fxquant.core.errors import LoweringError
from fxquant.core.ir import constant, site_name, tensor_at

aten = torch.ops.aten


def dims(node: object) -> tuple[int | torch.SymInt, ...]:
    """Return the traced shape of a node's tensor.

    Raises:
        LoweringError: the node carries no traced tensor.
    """
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor):
        raise LoweringError(f"node {node} has no traced tensor; capture the model with fxquant.capture")
    return tuple(value.shape)


def static_shape(node: object) -> list[int]:
    """Return the traced shape with -1 for sizes that depend on the batch."""
    return [size if isinstance(size, int) else -1 for size in dims(node)]


class Lowering:
    """Maps FX nodes to ONNX values while a graph is written.

    Args:
        module: the graph that is written.
        builder: takes nodes and constants.
        storage_bits: bits of a weight's grid -> bits it is stored in.
        weight_zeros: write the zero-points of weights, which are zeros.
    """

    def __init__(
        self, module: GraphModule, builder: GraphBuilder, storage_bits: dict[int, int], weight_zeros: bool = True
    ) -> None:
        self.module, self.builder, self.storage_bits, self.weight_zeros = module, builder, storage_bits, weight_zeros
        self.values: dict[Node, str | tuple[str, ...]] = {}
        self.layers: dict[str, str] = {}
        self._lazy: dict[tuple[Node, bool], str] = {}

    def value(self, node: Any) -> str:
        """Return the name of a node's value; constants and weights are written when they are first asked for."""
        if not isinstance(node, Node):
            raise LoweringError(f"{node!r} is not a tensor of the graph")
        found = self.values.get(node)
        if isinstance(found, str):
            return found
        if node.op == "get_attr":
            return self.constant(self._array(node), str(node.target))
        if node.target is dequantize_channels:
            return self._weight(node, False)
        raise LoweringError(f"node {node.name!r} is read before it is written")

    def transposed(self, weight: Any) -> str:
        """Return the value of a 2-d weight stored with its axes exchanged."""
        assert isinstance(weight, Node)
        if weight.target is dequantize_channels:
            return self._weight(weight, True)
        if weight.op == "get_attr":
            return self.constant(self._array(weight).T, str(weight.target))
        return self.write(weight, "Transpose", [self.value(weight)], perm=[1, 0])

    def member(self, source: Any, index: Any) -> str | None:
        """Return one value of a node that has several."""
        found = self.values.get(source)
        if isinstance(found, tuple) and isinstance(index, int):
            return found[index]
        return found if isinstance(found, str) and index == 0 else None

    def write(self, node: Node, op: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        """Append an ONNX node whose output is called after the FX node."""
        return self.builder.node(op, inputs, node.name, name, **attributes)

    def constant(self, array: Array, name: str) -> str:
        """Return the name of a constant."""
        return self.builder.constant(array, name)

    def constant_of(self, node: Any, name: str, bits: int = 8) -> str:
        """Return the name of a constant node's values; int8 weights on a grid of `bits` are packed accordingly."""
        return self.builder.constant(self._array(node), name, self.storage_bits.get(bits, 8))

    def number(self, value: float) -> str:
        """Return a float32 scalar."""
        return self.constant(np.array(value, np.float32), f"f{value:g}")

    def integers(self, values: Sequence[int]) -> str:
        """Return an int64 vector."""
        return self.constant(np.array(values, np.int64), "i" + "_".join(str(value) for value in values))

    def size(self, node: Node) -> str:
        """Return the int64 vector of length 1 that holds a dynamic size."""
        source, axis = node.args
        assert isinstance(axis, int)
        if (node, False) not in self._lazy:
            self._lazy[node, False] = self.write(node, "Shape", [self.value(source)], start=axis, end=axis + 1)
        return self._lazy[node, False]

    def pads(self, node: Node, widths: Sequence[int]) -> str:
        """Return pad widths in the order of ONNX: all axes before, then all axes behind."""
        rank = len(dims(node))
        pairs = [(widths[i], widths[i + 1]) for i in range(0, len(widths), 2)]
        pairs += [(0, 0)] * (rank - len(pairs))
        return self.integers([before for before, _ in reversed(pairs)] + [behind for _, behind in reversed(pairs)])

    def zero_point(self, node: Any) -> str:
        """Return an activation's zero-point as uint8."""
        array = self._array(node).astype(np.uint8)
        return self.constant(array, f"zp{int(array)}")

    def layer_name(self, node: Node) -> str:
        """Return the name of a layer: its module path, numbered where it is used twice."""
        weight = node.args[1]
        source = weight.args[0] if isinstance(weight, Node) and weight.target is dequantize_channels else weight
        path = _weight_path(source) if isinstance(source, Node) and source.op == "get_attr" else ""
        name = site_name(path) if path else node.name
        free, number = name, 1
        while free in self.layers:
            number += 1
            free = f"{name}#{number}"
        self.layers[free] = node.name
        return free

    def _array(self, node: Any) -> Array:
        tensor = constant(self.module, node)
        if tensor is None:
            raise LoweringError(f"{node} must be a constant of the graph")
        array: Array = tensor.detach().cpu().contiguous().numpy()
        return array

    def _weight(self, node: Node, transposed: bool) -> str:
        """Write integer weights, packed where a type for it exists, and their DequantizeLinear."""
        if (node, transposed) in self._lazy:
            return self._lazy[node, transposed]
        source, scale, axis, bits = node.args
        assert isinstance(source, Node)
        assert isinstance(axis, int)
        assert isinstance(bits, int)
        path = _weight_path(source)
        array = tensor_at(self.module, str(source.target)).detach().numpy()
        if transposed:
            array, axis = array.T, 1 - axis
        stored = self.storage_bits.get(bits, 0)
        q = self.builder.constant(array, path, stored if array.dtype == np.int8 else 0)
        if stored in (2, 4):
            # ONNX Runtime folds the Cast when it loads, and runs the same kernels as for 8 bits.
            q = self.builder.node("Cast", [q], f"{path}_i8", to=3)
        inputs = [q, self.constant(self._array(scale), f"{path}_scale")]
        if array.dtype == np.int8 and self.weight_zeros:
            # Without an explicit zero-point Gemm is not fused. Layers of one width share it.
            inputs.append(self.constant(np.zeros(array.shape[axis], np.int8), f"zeros_{array.shape[axis]}"))
        self._lazy[node, transposed] = self.builder.node("DequantizeLinear", inputs, f"{path}_dq", axis=axis)
        return self._lazy[node, transposed]


def _weight_path(source: Node) -> str:
    """Return the path of the model's weight that integers were made of."""
    return re.sub(r"_q(_\d+)?$", "", str(source.target))
