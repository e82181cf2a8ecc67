"""How many bits of a file the elements of a constant value take, followed through the operators that unpack it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from fxquant.backends.onnx.builder import Array

DEPTH = 40
"""Operators in a row that are followed at most; a damaged file may hold a circle."""

SAME = frozenset({"Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice"})
"""Operators behind which each element takes what it took; those that leave some out are as dense as before."""
TABLES = frozenset({"Range", "Div", "Mod", "Mul", "Sub", "Expand", "ConstantOfShape"})
"""Operators that make tables of a few numbers, which no weight is charged for."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Constant:
    """A value that does not depend on the graph's inputs: its shape and the bits of the file it was made of."""

    shape: Shape
    bits: float

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class StoredWidths:
    """Answers for the values of one graph.

    Args:
        makers: value -> the node that makes it.
        stored: initializer -> its shape and the bits of an element.
        numbers: reads an initializer; raises where it cannot.
    """

    def __init__(
        self,
        makers: Mapping[str, onnx.NodeProto],
        stored: Mapping[str, tuple[Shape, int]],
        numbers: Callable[[str], Array],
    ) -> None:
        self._makers, self._stored, self._numbers = makers, stored, numbers
        self._known: dict[str, _Constant | None] = {}

    def of(self, name: str) -> float | None:
        """Return the bits that one element of a value takes, None for what is computed from the graph's inputs."""
        try:
            found = self._constant(name, DEPTH)
        except (ValueError, TypeError, IndexError, ZeroDivisionError, OverflowError):
            # Shapes that do not fit each other: others say that the file is damaged.
            return None
        return found.bits / found.size if found is not None and found.size > 0 else None

    def _constant(self, name: str, depth: int) -> _Constant | None:
        if name not in self._known:
            if name in self._stored:
                shape, bits = self._stored[name]
                self._known[name] = _Constant(shape, bits * math.prod(shape))
            else:
                node = self._makers.get(name)
                self._known[name] = None if node is None or depth == 0 else self._made(node, name, depth - 1)
        return self._known[name]

    def _made(self, node: onnx.NodeProto, name: str, depth: int) -> _Constant | None:
        read = [self._constant(source, depth) for source in node.input if source]
        inputs = [constant for constant in read if constant is not None]
        if len(inputs) < len(read) or not inputs:
            return None
        first, axis = inputs[0], next((a.i for a in node.attribute if a.name == "axis"), 0)
        op = node.op_type
        if op in SAME:
            shape = self._shape(node, first.shape)
            return _Constant(shape, first.bits * math.prod(shape) / max(1, first.size))
        if op in TABLES:
            return _Constant(self._shape(node, _broadcast(inputs)), 0.0)
        if op in ("Add", "BitwiseOr"):
            return _Constant(_broadcast(inputs), sum(constant.bits for constant in inputs))
        if op == "Concat":
            length = sum(constant.shape[axis] for constant in inputs)
            shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])
            return _Constant(shape, sum(constant.bits for constant in inputs))
        if op == "Split":
            length = int(self._numbers(node.input[1])[list(node.output).index(name)])
            shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])
            return _Constant(shape, first.bits * length / first.shape[axis])
        if op in ("Gather", "GatherElements", "GatherND"):
            index = inputs[1]
            if op == "GatherElements":
                return _Constant(index.shape, index.bits)
            if op == "GatherND":
                # Of the forms with one index for each table, which weights are written in.
                return _Constant((*index.shape[:-1], *first.shape[2:]), index.bits)
            shape = (*first.shape[:axis], *index.shape, *first.shape[axis + 1 :])
            maker = self._makers.get(node.input[0])
            # What is looked up takes its indices; rows that are put in order take what they are.
            rows = maker is not None and maker.op_type == "Concat"
            return _Constant(shape, first.bits if rows else index.bits)
        return None

    def _shape(self, node: onnx.NodeProto, shape: Shape) -> Shape:
        """Return the shape of the result of an operator with one operand that matters."""
        if node.op_type == "Reshape":
            asked = [int(size) for size in self._numbers(node.input[1])]
            sizes = [shape[axis] if size == 0 else size for axis, size in enumerate(asked)]
            rest = math.prod(size for size in sizes if size != -1)
            return tuple(math.prod(shape) // rest if size == -1 else size for size in sizes)
        if node.op_type == "Unsqueeze":
            (axis,) = self._numbers(node.input[1])
            return (*shape[: int(axis)], 1, *shape[int(axis) :])
        if node.op_type == "Range":
            start, end, step = (int(self._numbers(source)) for source in node.input)
            return (len(range(start, end, step)),)
        if node.op_type == "Slice":
            # Only the count of elements is asked for.
            return (math.prod(shape),)
        return shape


def _broadcast(inputs: list[_Constant]) -> Shape:
    return tuple(int(size) for size in np.broadcast_shapes(*(constant.shape for constant in inputs)))
