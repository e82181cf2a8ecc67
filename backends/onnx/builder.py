"""Builds an ONNX graph: unique names, shared constants, numbers below a byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, product
from string import ascii_letters
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from fxquant.core.storage import code_for

Array = NDArray[Any]

OLDEST = 18
"""Operator set of a file that needs nothing newer."""
SINCE = {"Gelu": 20}
"""Operator -> the operator set that has it, where that is newer."""
TYPES: dict[int, tuple[int, int]] = {
    TensorProto.INT4: (4, 21),
    TensorProto.UINT4: (4, 21),
    TensorProto.INT2: (2, 25),
}
"""Types below a byte -> bits, and the operator set that has them."""


class GraphBuilder:
    """Collects the nodes and constants of one graph."""

    def __init__(self) -> None:
        self.opset = OLDEST
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._names: set[str] = set()
        self._constants: dict[object, str] = {}
        self._renamed: dict[str, str] = {}

    def unique(self, name: str) -> str:
        """Reserve and return `name`, numbered if it is taken."""
        free, number = name, 1
        while free in self._names:
            number += 1
            free = f"{name}_{number}"
        self._names.add(free)
        return free

    def constant(self, array: Array, name: str) -> str:
        """Return the name of a constant of this content; equal content is stored once.

        Args:
            array: the values.
            name: wished for; taken if the content is new.
        """
        # A scalar must stay a scalar: ascontiguousarray would make it a vector of one.
        array = array if array.ndim == 0 else np.ascontiguousarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        return self._stored(key, name, lambda free: onnx.numpy_helper.from_array(array, free))

    def packed(self, values: Array, kind: int, shape: Sequence[int], name: str) -> str:
        """Return the name of a constant of whole numbers below a byte; equal content of one type is stored once.

        Args:
            values: as many as the shape has, in the range of the type.
            kind: one of `TYPES`, which may need a newer operator set.
            shape: of the constant.
            name: wished for; taken if the content is new.
        """
        bits, since = TYPES[kind]
        self.opset = max(self.opset, since)
        (data,) = code_for(1 << bits).encode(values.reshape(-1).astype(np.uint8) & ((1 << bits) - 1))
        key = (kind, tuple(shape), data.tobytes())
        return self._stored(key, name, lambda free: helper.make_tensor(free, kind, shape, data.tobytes(), raw=True))

    def _stored(self, key: object, name: str, make: Callable[[str], onnx.TensorProto]) -> str:
        if key not in self._constants:
            self._constants[key] = self.unique(name)
            self.initializers.append(make(self._constants[key]))
        return self._constants[key]

    def node(self, op: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the name its output got."""
        result = self.unique(output)
        self.emit(op, inputs, [result], name, **attributes)
        return result

    def emit(self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **attributes: Any) -> None:
        """Append a node whose outputs have names that are reserved for them."""
        self.opset = max(self.opset, SINCE.get(op, 0))
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name or None, **attributes))

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
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        name: str,
        labels: Mapping[str, str] | None = None,
    ) -> onnx.ModelProto:
        """Return the finished model; constants that nothing reads are left out.

        Args:
            inputs: what it takes.
            outputs: what it returns.
            name: of the graph.
            labels: value -> what it is called in the file; others get names of a letter or two.
        """
        read = {value for node in self.nodes for value in node.input}
        used = [tensor for tensor in self.initializers if tensor.name in read]
        self._shorten(used, {entry.name: entry.name for entry in (*inputs, *outputs)} | dict(labels or {}))
        graph = helper.make_graph(self.nodes, name, inputs, outputs, used)
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(graph, producer_name="fxquant", opset_imports=[opset])
        # onnx would write its own newest file version, which runtimes refuse.
        model.ir_version = helper.find_min_ir_version_for([opset])
        return model

    def _shorten(self, constants: Sequence[onnx.TensorProto], labels: Mapping[str, str]) -> None:
        """Rename all values: each is named where it is made and wherever it is read, which adds up in a small file."""
        lists = [names for node in self.nodes for names in (node.input, node.output)]
        found = Counter(name for names in lists for name in names)
        taken, short = set(labels.values()), {"": ""}
        free = (name for name in short_names() if name not in taken)
        # What is named most often gets the shortest name.
        short |= {name: labels.get(name) or next(free) for name, _ in found.most_common() if name}
        for names in lists:
            names[:] = [short[name] for name in names]
        for tensor in constants:
            tensor.name = short[tensor.name]


def short_names() -> Iterator[str]:
    """Yield a, b, ..., Z, aa, ab, ..."""
    for length in count(1):
        yield from map("".join, product(ascii_letters, repeat=length))
