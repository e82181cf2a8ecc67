"""The state of one lowering to ONNX: which FX node became which value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch.fx import GraphModule, Node

from fxquant.backends.onnx.builder import Array, GraphBuilder
from fxquant.backends.onnx.export_options import OnnxOptions
from fxquant.backends.onnx.packed_weights import PackedWeights
from fxquant.backends.qdq_ops import dequantize, dequantize_channels, stored_channels
from fxquant.core.errors import LoweringError
from fxquant.core.ir import constant, site_name, tensor_at

aten = torch.ops.aten

DEQUANTIZERS = (dequantize, dequantize_channels)
"""Both have their scale behind the integers."""
FEW = 48
"""Zeros that take fewer bytes than an operator that makes them."""


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
        options: of the file.
    """

    def __init__(self, module: GraphModule, builder: GraphBuilder, options: OnnxOptions) -> None:
        self.module, self.builder, self.options = module, builder, options
        self.for_openvino = options.runtime == "openvino"
        self.weights = PackedWeights(builder, folds_all=not self.for_openvino)
        self.values: dict[Node, str | tuple[str, ...]] = {}
        self.layers: dict[str, str] = {}
        #: layers whose weights would take fewer bytes in a form that the runtime does not fold
        self.unpacked: list[str] = []
        self._lazy: dict[tuple[Node, bool], str] = {}
        #: values of numbers that the graph computes of sizes
        self.sizes: dict[Node, str] = {}
        self._products: dict[tuple[object, ...], str] = {}
        self._zero_points: dict[int, str] = {}
        self._exchanged: dict[str, str] = {}
        constants = [node for node in module.graph.nodes if node.op == "get_attr"]
        self._read_as_they_are = {_memory(module, n) for n in constants if not all(_exchanges(u, n) for u in n.users)}

    def value(self, node: Any) -> str:
        """Return the name of a node's value; constants and weights are written when they are first asked for."""
        if not isinstance(node, Node):
            raise LoweringError(f"{node!r} is not a tensor of the graph")
        found = self.values.get(node)
        if isinstance(found, str):
            return found
        if node.op == "get_attr":
            return self.constant(self.array(node), str(node.target))
        if node.target is dequantize_channels:
            return self._weight(node, False)
        if node.target is stored_channels:
            return self.float_weight(node)
        raise LoweringError(f"node {node.name!r} is read before it is written")

    def float_weight(self, weight: Node, order: Array | None = None) -> str:
        """Return a weight that a float op reads, its rows in another order if one is given.

        Stored integers are made float by operators that are folded when the file is loaded; a DequantizeLinear would
        run in every call.
        """
        if weight.op == "get_attr":
            array = self.array(weight)
            return self.constant(array if order is None else array[order], str(weight.target))
        if order is None and (weight, False) in self._lazy:
            return self._lazy[weight, False]
        integers, scales = self.stored_integers(weight, order)
        column = self.integers([-1, *[1] * (len(dims(weight)) - 1)])
        factors = [
            self.builder.node("Cast", [integers], "weight", to=TensorProto.FLOAT),
            self.builder.node("Reshape", [scales, column], "scale"),
        ]
        value = self.builder.node("Mul", factors, "weight")
        if order is None:
            self._lazy[weight, False] = value
        return value

    def stored_integers(self, weight: Node, order: Array | None = None) -> tuple[str, str]:
        """Return the int8 values and the scales of a stored weight, rows in another order if one is given."""
        source, scale, _ = weight.args
        assert isinstance(source, Node)
        array, scales = self.array(source), self.array(scale)
        if order is not None:
            array, scales = array[order], scales[order]
        return self._integers(array, 0, _weight_path(source)), self.constant(scales, f"{_weight_path(source)}_scale")

    def transposed(self, weight: Any) -> str:
        """Return the value of a 2-d weight stored with its axes exchanged."""
        assert isinstance(weight, Node)
        if weight.target is dequantize_channels:
            return self._weight(weight, True)
        if weight.op == "get_attr" and _memory(self.module, weight) not in self._read_as_they_are:
            return self.constant(self.array(weight).T, str(weight.target))
        # What is stored for another reader is exchanged when the file is loaded.
        value = self.value(weight)
        if value not in self._exchanged:
            self._exchanged[value] = self.write(weight, "Transpose", [value], perm=[1, 0])
        return self._exchanged[value]

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
        """Return the name of a constant node's values; whole numbers of at most 4 bits get a type of 2 or 4 bits."""
        array = self.array(node)
        if bits > 4:
            return self.builder.constant(array, name)
        # OpenVINO 2026.4 reads no INT2.
        kind = TensorProto.INT2 if bits == 2 and not self.for_openvino else TensorProto.INT4
        return self.builder.packed(array, kind, array.shape, name)

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
        if node not in self.sizes:
            self.sizes[node] = self.write(node, "Shape", [self.value(source)], start=axis, end=axis + 1)
        return self.sizes[node]

    def pads(self, node: Node, widths: Sequence[Any]) -> list[Any]:
        """Return pad widths in the order of ONNX: all axes before, then all axes behind."""
        rank = len(dims(node))
        pairs = [(widths[i], widths[i + 1]) for i in range(0, len(widths), 2)]
        pairs += [(0, 0)] * (rank - len(pairs))
        return [before for before, _ in reversed(pairs)] + [behind for _, behind in reversed(pairs)]

    def zero_point(self, node: Any) -> str:
        """Return an activation's zero-point as uint8."""
        array = self.array(node).astype(np.uint8)
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

    def array(self, node: Any) -> Array:
        """Return the values of a constant."""
        tensor = constant(self.module, node)
        if tensor is None:
            raise LoweringError(f"{node} must be a constant of the graph")
        if tensor.is_complex():
            # As PyTorch's exporter writes complex numbers: real and imaginary parts along a last axis.
            tensor = torch.view_as_real(tensor.detach().resolve_conj())
        array: Array = tensor.detach().cpu().contiguous().numpy()
        return array

    def _weight(self, node: Node, transposed: bool) -> str:
        """Write integers with one scale per channel and their DequantizeLinear."""
        if (node, transposed) in self._lazy:
            return self._lazy[node, transposed]
        source, scale, axis = node.args
        assert isinstance(source, Node)
        assert isinstance(axis, int)
        path = _weight_path(source)
        array = tensor_at(self.module, str(source.target)).detach().numpy()
        if transposed:
            array, axis = array.T, 1 - axis
        inputs = [self._integers(array, axis, path), self._product_of_scales(node) or self.value(scale)]
        if array.dtype == np.int8 and not self.for_openvino:
            # Without an explicit zero-point Gemm is not fused; shared ones keep OpenVINO from integers.
            inputs.append(self._zeros(array.shape[axis]))
        self._lazy[node, transposed] = self.builder.node("DequantizeLinear", inputs, f"{path}_dq", axis=axis)
        return self._lazy[node, transposed]

    def _integers(self, array: Array, axis: int, path: str) -> str:
        if array.dtype != np.int8 or not self.options.packed:
            return self.constant(array, path)
        value, shortest = self.weights.add(array, axis, path)
        if not shortest:
            self.unpacked.append(site_name(path))
        return value

    def _product_of_scales(self, node: Node) -> str | None:
        """Return the scale of a bias as the product of the two that it is made of, None for other scales."""
        for user in node.users:
            scales = [s.args[1] for s in user.args[:2] if isinstance(s, Node) and s.target in DEQUANTIZERS]
            if len(scales) == 2 and node not in user.args[:2]:
                one, other = (self.array(scale) for scale in scales)
                if np.array_equal(one * other, self.array(node.args[1])):
                    key = tuple(scales)
                    if key not in self._products:
                        names = [self.value(scale) for scale in scales]
                        self._products[key] = self.builder.node("Mul", names, "scale")
                    return self._products[key]
        return None

    def _zeros(self, count: int) -> str:
        """Return zero-points of weights, shared by the layers of one width."""
        if count < FEW:
            return self.constant(np.zeros(count, np.int8), "zeros")
        if count not in self._zero_points:
            inputs = [self.constant(np.array(0, np.int8), "zero"), self.integers([count])]
            self._zero_points[count] = self.builder.node("Expand", inputs, "zeros")
        return self._zero_points[count]


def _memory(module: GraphModule, node: Node) -> tuple[int, tuple[int, ...]]:
    """Return where the values of a constant lie and their shape, the same for tied parameters."""
    tensor = tensor_at(module, str(node.target))
    return tensor.data_ptr(), tuple(tensor.shape)


def _exchanges(user: Node, weight: Node) -> bool:
    """Whether a linear layer reads a weight with its axes exchanged: one on rows has an operator that does it."""
    return user.target is aten.linear.default and user.args[1] is weight and len(dims(user.args[0])) > 2


def _weight_path(source: Node) -> str:
    """Return the path of the model's weight that integers were made of."""
    return re.sub(r"_q(_\d+)?$", "", str(source.target))
