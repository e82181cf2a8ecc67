"""Canonicalize: one spelling per meaning, and nothing that computes nothing."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.core.ir import Program, constant, erase_dead, is_constant, shape_of, sizes
from fxquant.passes.base import Pass
from fxquant.passes.core_aten import as_layer
from fxquant.passes.linear_layers import RESHAPES, as_linear
from fxquant.passes.recurrent_cells import as_linear_layers

aten = torch.ops.aten


def _whole_slice(node: Node) -> bool:
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else None
    step = node.args[4] if len(node.args) > 4 else 1
    return start in (0, None) and end in (None, sys.maxsize) and bool(step == 1)


def _keeps_shape(node: Node) -> bool:
    source = node.args[0]
    traced = isinstance(source, Node) and "val" in source.meta and "val" in node.meta
    return isinstance(source, Node) and traced and sizes(source) == sizes(node)


def _always(node: Node) -> bool:
    del node
    return True


IDENTITIES: dict[object, Callable[[Node], bool]] = {
    aten.clone.default: _always,
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.dropout.default: lambda node: len(node.args) > 2 and node.args[2] is False,
    aten.slice.Tensor: _whole_slice,
    **dict.fromkeys((*RESHAPES, aten.expand.default), _keeps_shape),
}
"""Op -> whether a node of it returns its first input unchanged."""


SPELLINGS: dict[object, Callable[..., Any]] = {
    # A view demands strides that an erased clone may have provided; a reshape copies where it must.
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.mm.default: aten.matmul.default,
}
"""Op -> the one op that is used for its meaning."""


PARTS = (aten.split.Tensor, aten.split_with_sizes.default)
"""Ops that take a value apart along an axis, given as the third argument."""


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Erase identities and dead nodes, move keyword arguments into position, spell "same" padding as numbers, products
    with a parameter and recurrent cells as linear layers, and layers that were taken apart as layers again."""

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program in canonical form."""
        module = program.module
        rewrites = sum(_canonical(module, node) for node in module.graph.nodes)
        rewrites += erase_dead(module)
        return program, rewrites


def _canonical(module: GraphModule, node: Node) -> int:
    if node.op != "call_function":
        return 0
    # Arguments first: what follows reads them by position.
    rewrites = _positional(node) + as_layer(node) + _without_empty(node)
    if as_linear_layers(module, node):
        return rewrites + 1
    identity = IDENTITIES.get(node.target)
    if identity is not None and identity(node):
        source = node.args[0]
        assert isinstance(source, Node)
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
        return rewrites + 1
    if _as_slices(node):
        return rewrites + 1
    spelling = SPELLINGS.get(node.target)
    if spelling is not None:
        node.target = spelling
        rewrites += 1
    return rewrites + _explicit_padding(node) + _one_slope(module, node) + as_linear(module, node)


def _as_slices(node: Node) -> bool:
    """Write what takes a value apart as slices, which keep the grid; return whether it was such an op.

    A split of images, or of a size that is free, stays.
    """
    if node.target not in PARTS or not all(user.target is operator.getitem for user in node.users):
        return False
    source, dim = node.args[0], node.args[2] if len(node.args) > 2 else 0
    if not isinstance(source, Node) or not isinstance(dim, int):
        return False
    lengths = [part.shape[dim] for part in node.meta["val"]]
    if dim % source.meta["val"].dim() == 0 or not all(isinstance(length, int) for length in lengths):
        return False
    for user in list(node.users):
        which = int(str(user.args[1])) % len(lengths)
        start = sum(lengths[:which])
        with node.graph.inserting_before(user):
            part = node.graph.call_function(aten.slice.Tensor, (source, dim, start, start + lengths[which]))
        part.meta = dict(user.meta)
        user.replace_all_uses_with(part)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return True


def _without_empty(node: Node) -> int:
    """Leave out parts of a concatenation that hold nothing; no image ever gives them a range."""
    if node.target is not aten.cat.default or not isinstance(node.args[0], list | tuple):
        return 0
    parts = [part for part in node.args[0] if not isinstance(part, Node) or 0 not in sizes(part)]
    if not 0 < len(parts) < len(node.args[0]):
        return 0
    node.args = (parts, *node.args[1:])
    return 1


def _positional(node: Node) -> int:
    if not node.kwargs or not isinstance(node.target, torch._ops.OpOverload):
        return 0
    schema = node.target._schema.arguments
    names = [argument.name for argument in schema if not argument.kwarg_only]
    movable = {name: value for name, value in node.kwargs.items() if name in names}
    if not movable:
        return 0
    values = {argument.name: argument.default_value for argument in schema}
    values |= {**dict(zip(names, node.args, strict=False)), **movable}
    last = max(names.index(name) for name in movable)
    node.args = tuple(values[name] for name in names[: max(last + 1, len(node.args))])
    node.kwargs = {name: value for name, value in node.kwargs.items() if name not in movable}
    return 1


def _one_slope(module: GraphModule, node: Node) -> int:
    """Rewrite a PReLU with one slope for all channels as the LeakyReLU that it is: runtimes have integer kernels."""
    slope = constant(module, node.args[1]) if node.target is aten.prelu.default else None
    if slope is None or slope.numel() != 1:
        return 0
    node.target, node.args = aten.leaky_relu.default, (node.args[0], float(slope))
    return 1


def _explicit_padding(node: Node) -> int:
    """Rewrite conv(padding="same" | "valid") with numbers where both sides pad alike."""
    if node.target not in (aten.conv1d.padding, aten.conv2d.padding) or not is_constant(node.args[1]):
        return 0
    args: list[Any] = [*node.args, *(None, [1], "valid", [1], 1)[len(node.args) - 2 :]]
    kernel = shape_of(node.args[1])[2:]
    dilation = args[5] if isinstance(args[5], list | tuple) else [args[5]]
    spread = [(k - 1) * dilation[i % len(dilation)] for i, k in enumerate(kernel)]
    if args[4] == "same" and any(s % 2 for s in spread):
        return 0
    args[4] = [s // 2 for s in spread] if args[4] == "same" else [0] * len(kernel)
    node.target = aten.conv1d.default if len(kernel) == 1 else aten.conv2d.default
    node.args = tuple(args)
    return 1
