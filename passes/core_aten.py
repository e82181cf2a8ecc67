"""Layers that `ExportedProgram.run_decompositions` took apart into core ATen ops, put together again."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from fxquant.core.ir import arguments, shape_of

aten = torch.ops.aten

Spelling = tuple[Callable[..., Any], tuple[Any, ...]]
"""An op and its arguments."""

CONVOLUTIONS: dict[tuple[bool, int], Callable[..., Any]] = {
    (False, 3): aten.conv1d.default,
    (False, 4): aten.conv2d.default,
    (False, 5): aten.conv3d.default,
    (True, 3): aten.conv_transpose1d.default,
    (True, 4): aten.conv_transpose2d.input,
    (True, 5): aten.conv_transpose3d.input,
}
"""Whether it is transposed, and axes of its weight -> the convolution."""


def _convolution(given: dict[str, Any]) -> Spelling | None:
    transposed = bool(given["transposed"])
    target = CONVOLUTIONS.get((transposed, len(shape_of(given["weight"]))))
    names = ("stride", "padding", *(("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")))
    return None if target is None else (target, _picked(given, "input", "weight", "bias", *names))


def _picked(given: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(given[name] for name in names)


def _same(target: Callable[..., Any], *names: str) -> Callable[[dict[str, Any]], Spelling | None]:
    """Return what spells an op as `target`, which takes these of its arguments."""
    return lambda given: (target, _picked(given, *names))


LAYERS: dict[object, Callable[[dict[str, Any]], Spelling | None]] = {
    aten.convolution.default: _convolution,
    aten._adaptive_avg_pool2d.default: _same(aten.adaptive_avg_pool2d.default, "self", "output_size"),
    aten._softmax.default: lambda given: (
        None if given["half_to_float"] else (aten.softmax.int, _picked(given, "self", "dim"))
    ),
    aten.max_pool2d_with_indices.default: _same(
        aten.max_pool2d.default, "self", "kernel_size", "stride", "padding", "dilation", "ceil_mode"
    ),
    aten.native_layer_norm.default: _same(
        aten.layer_norm.default, "input", "normalized_shape", "weight", "bias", "eps"
    ),
    aten.native_group_norm.default: _same(aten.group_norm.default, "input", "group", "weight", "bias", "eps"),
}
"""Core ATen op -> what it was, from its arguments by name. Of several results, that is the first one."""


def as_layer(node: Node) -> int:
    """Rewrite a core ATen op as the layer it was taken from and return whether it was one, 1 or 0."""
    spell = LAYERS.get(node.target)
    results = _results(node)
    found = None if spell is None or results is None else spell(arguments(node))
    if found is None or results is None:
        return 0
    for result in results:
        result.target, result.args, result.kwargs = *found, {}
    return 1


def _results(node: Node) -> Sequence[Node] | None:
    """Return the nodes that read the one tensor which a layer returns, None where another one is read too."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        return [node]
    users = list(node.users)
    return users if all(user.target is operator.getitem and user.args[1] == 0 for user in users) else None
