"""Sizes that depend on the input, computed in the file: what a graph does with the numbers in a tensor's shape."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fxquant.backends.onnx.lowering import Lowering

OPERATORS: dict[object, str] = {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    operator.mod: "Mod",
    torch.sym_max: "Max",
    torch.sym_min: "Min",
}
"""Function of two whole numbers -> ONNX operator. Both take the sign of `a mod b` from b."""


def size_vector(lowering: Lowering, sizes: Sequence[Any]) -> str | None:
    """Return an int64 vector of numbers and nodes that hold one, None where one of them has no form here."""
    if all(isinstance(size, int) for size in sizes):
        return lowering.integers(list(sizes))
    parts = [size_value(lowering, size) for size in sizes]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if len(known) == 1:
        return known[0]
    return lowering.builder.node("Concat", known, "sizes", axis=0)


def size_value(lowering: Lowering, size: Any) -> str | None:
    """Return an int64 vector of length 1 with a number that a graph computes of sizes."""
    if isinstance(size, int):
        return lowering.integers([size])
    if not isinstance(size, Node):
        return None
    if size.target is torch.ops.aten.sym_size.int:
        return lowering.size(size)
    if size not in lowering.sizes:
        written = _written(lowering, size)
        if written is None:
            return None
        lowering.sizes[size] = written
    return lowering.sizes[size]


def _written(lowering: Lowering, node: Node) -> str | None:
    operands = [size_value(lowering, operand) for operand in node.args]
    given = [operand for operand in operands if operand is not None]
    if len(given) < len(operands) or node.kwargs:
        return None
    if node.target is operator.neg:
        return lowering.builder.node("Neg", given, node.name)
    if node.target in OPERATORS and len(given) == 2:
        return lowering.builder.node(OPERATORS[node.target], given, node.name)
    if node.target is operator.floordiv:
        # Div rounds towards zero; what is left of the remainder divides exactly.
        rest = lowering.builder.node("Mod", given, f"{node.name}_rest")
        whole = lowering.builder.node("Sub", [given[0], rest], f"{node.name}_whole")
        return lowering.builder.node("Div", [whole, given[1]], node.name)
    return None
