"""Keep the slices of volumes apart between layers that read slices: what treats pixels alike need not see volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.core.ir import rule_of, shape_of, sizes, trace
from fxquant.passes.new_form import SWAP

aten = torch.ops.aten

Insert = Callable[..., Node]
"""Inserts an op with these operands, and returns it traced."""


def apart(insert: Insert, volume: Node) -> Node:
    """Return the slices of volumes (N, C, D, H, W) as images (N D, C, H, W)."""
    _, channels, _, *pixels = shape_of(volume)
    return insert(aten.reshape.default, insert(aten.permute.default, volume, SWAP), [-1, channels, *pixels])


def together(insert: Insert, images: Node, depth: int) -> Node:
    """Return the volumes of which images are the slices, `depth` for each."""
    value = insert(aten.reshape.default, images, [-1, depth, *shape_of(images)[1:]])
    return insert(aten.permute.default, value, SWAP)


def join_moves(module: GraphModule) -> None:
    """Let ops between volumes that were brought together compute on slices, and erase moves that undo each other."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and _reads_volumes(node):
            _on_slices(node)
    for node in list(module.graph.nodes):
        source = _source(node)
        if source is None:
            continue
        if node.target is source.target is aten.permute.default and node.args[1] == source.args[1] == SWAP:
            node.replace_all_uses_with(source.all_input_nodes[0])
        elif node.target is aten.reshape.default:
            if source.target is aten.reshape.default:
                node.replace_input_with(source, source := source.all_input_nodes[0])
            if sizes(node) == sizes(source):
                node.replace_all_uses_with(source)


def _source(node: Node) -> Node | None:
    source = node.args[0] if node.op == "call_function" and node.args else None
    return source if isinstance(source, Node) else None


def _operands(node: Node) -> Sequence[Any]:
    parts = node.args[0] if node.target is aten.cat.default else None
    return parts if isinstance(parts, list | tuple) else node.all_input_nodes


def _reads_volumes(node: Node) -> bool:
    """Whether an op treats every pixel alike and reads nothing but volumes of one size that were brought together."""
    operands = _operands(node)
    if any(isinstance(value, Node) for value in node.kwargs.values()) or not operands:
        return False
    if not all(isinstance(source, Node) and _is_together(source) for source in operands):
        return False
    if node.target is aten.cat.default:
        return node.args[1:] == (1,)
    rule = rule_of(node)
    alike = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
    return (alike or (rule is not None and rule.pointwise)) and all(sizes(source) == sizes(node) for source in operands)


def _is_together(node: Node) -> bool:
    return node.target is aten.permute.default and node.args[1] == SWAP and len(shape_of(node)) == 5


def _on_slices(node: Node) -> None:
    """Compute an op on slices and bring its results together."""

    def insert(target: Callable[..., Any], *operands: Any, **options: Any) -> Node:
        with node.graph.inserting_before(node):
            made = node.graph.call_function(target, operands, options)
        made.meta = {key: value for key, value in node.meta.items() if key != "val"}
        return trace(made)

    assert callable(node.target)
    args: Any = map_arg(node.args, lambda volume: apart(insert, volume))
    images = insert(node.target, *args, **node.kwargs)
    node.replace_all_uses_with(together(insert, images, shape_of(node)[2]))
