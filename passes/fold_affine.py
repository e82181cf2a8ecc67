"""Fold what multiplies and shifts a layer's output by constants into the layer, across views and a clip in between.

With y = a clip(W x + b, l, h) + c, a and c numbers or one value for each channel:
    W' = a W,    b' = a b + c,    and for numbers the clip to a l + c and a h + c, exchanged where a < 0.
With a value for each channel only ReLU stays a clip of one kind, for a > 0 and c = 0.

The scale of a residual branch (EDSR, ESRGAN), LayerScale (CaiT, DINOv2, ConvNeXt behind a transpose), that of queries
in attention, the affine of HGNetV2 behind its ReLU: as ops of their own they would cost a conversion to float and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isinf
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.core.facts import NormStatistics
from fxquant.core.ir import (
    OPS,
    Program,
    ScaleRule,
    activation_inputs,
    arguments,
    clip_bounds,
    constant,
    erase_dead,
    rule_of,
    set_parameter,
    shape_of,
    tensor_at,
)
from fxquant.passes.base import Pass
from fxquant.passes.fold_batchnorm import bias_path

aten = torch.ops.aten

Values = tuple[float | Tensor, float | Tensor]
"""Factor and shift: numbers, or float64 tensors with a value for each channel."""

Form = Callable[[float | Tensor, float], Values]
"""Makes factor and shift of the constant and the op's `alpha`, which scales the second operand of a sum."""

BEHIND: dict[object, Form] = {
    aten.mul.Tensor: lambda value, _: (value, 0.0),
    aten.div.Tensor: lambda value, _: (1.0 / torch.as_tensor(value, dtype=torch.float64), 0.0),
    aten.add.Tensor: lambda value, alpha: (1.0, alpha * value),
    aten.sub.Tensor: lambda value, alpha: (1.0, -alpha * value),
    aten.rsub.Scalar: lambda value, alpha: (-alpha, value),
}
"""Op of a value and a constant -> its form."""
IN_FRONT: dict[object, Form] = {
    aten.mul.Tensor: lambda value, _: (value, 0.0),
    aten.add.Tensor: lambda value, alpha: (alpha, value),
    aten.sub.Tensor: lambda value, alpha: (-alpha, value),
}
"""Op of a constant and a value -> its form."""


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Fold constants that multiply or shift the output of a layer whose weight nothing else reads."""

    reads = (NormStatistics,)
    writes = (NormStatistics,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with foldable factors and shifts gone."""
        module, known = program.module, dict(program[NormStatistics].folded)
        count = 0
        for node in list(module.graph.nodes):
            layer = _fold(module, node)
            if layer is not None:
                # What the norm knew was of the output as it was.
                known.pop(layer.name, None)
                count += 1
        erase_dead(module)
        return program.with_facts(NormStatistics(known)), count


def _fold(module: GraphModule, node: Node) -> Node | None:
    """Fold a node into its layer and return that, None where it cannot be folded."""
    found = _operands(module, node)
    if found is None:
        return None
    source, value, form = found
    *behind, layer = _way_back(source)
    if len(layer.users) != 1 or not _is_free(module, layer):
        return None
    if isinstance(value, Tensor):
        axis = _axis_behind(behind[::-1], _channel_axis(module, layer))
        shaped = None if axis is None else _by_channel(value, shape_of(source), axis)
        if shaped is None:
            return None
        value = shaped
    alpha = node.kwargs.get("alpha", 1)
    assert isinstance(alpha, int | float)
    factor, shift = (_number(each) for each in form(value, float(alpha)))
    made = _parameters(module, layer, factor, shift)
    clip = next(filter(_is_clip, behind), None)
    if made is None or (clip is not None and not _move_clip(clip, factor, shift)):
        return None
    _put(module, layer, *made)
    node.replace_all_uses_with(source)
    module.graph.erase_node(node)
    return layer


def _number(value: float | Tensor) -> float | Tensor:
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value


def _way_back(source: Node) -> list[Node]:
    """Return a value and what it is made of, as far as views and one clip read nothing else and alone read that."""
    way, clips = [source], 0
    while len(way[-1].users) == 1:
        rule, before = rule_of(way[-1]), way[-1].args[0] if way[-1].args else None
        clips += _is_clip(way[-1])
        moves = rule is not None and (rule.is_view or _is_clip(way[-1])) and activation_inputs(way[-1]) == (before,)
        if not moves or not isinstance(before, Node) or clips > 1:
            break
        way.append(before)
    return way


def _axis_behind(way: list[Node], axis: int) -> int | None:
    """Return which axis counts channels behind views and clips, None where they may no longer have one."""
    for node in way:
        axes = len(shape_of(node))
        if node.target is aten.permute.default:
            dims = [int(str(dim)) % axes for dim in arguments(node)["dims"]]
            axis = dims.index(axis)
        elif node.target is aten.transpose.int:
            pair = [int(str(dim)) % axes for dim in node.args[1:3]]
            axis = pair[1 - pair.index(axis)] if axis in pair else axis
        elif not _is_clip(node):
            return None
    return axis


def _operands(module: GraphModule, node: Node) -> tuple[Node, float | Tensor, Form] | None:
    """Return value, constant and form of an affine op that keeps the value's shape and type, None for other nodes."""
    if len(node.args) != 2:
        return None
    for forms, (value, other) in ((BEHIND, node.args), (IN_FRONT, node.args[::-1])):
        if node.target not in forms or not isinstance(value, Node) or constant(module, value) is not None:
            continue
        held = _real(other if isinstance(other, int | float) else _viewed(module, other))
        before, after = value.meta.get("val"), node.meta.get("val")
        same = isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype is after.dtype
        if held is not None and same and shape_of(value) == shape_of(node):
            return value, held, forms[node.target]
    return None


def _viewed(module: GraphModule, node: object) -> Tensor | None:
    """Return a parameter, or views of one, None for what is neither."""
    if not isinstance(node, Node) or node.op == "get_attr":
        return constant(module, node)
    rule = rule_of(node)
    if rule is None or not rule.is_view or node.all_input_nodes != [node.args[0]]:
        return None
    held = _viewed(module, node.args[0])
    assert callable(node.target)
    made: Tensor | None = None if held is None else node.target(held, *node.args[1:], **node.kwargs)
    return made


def _real(value: float | Tensor | None) -> float | Tensor | None:
    """Return a constant in float64, as a number where it holds but one; None for complex numbers."""
    if not isinstance(value, Tensor):
        return value if value is None else float(value)
    if value.is_complex():
        return None
    return float(value) if value.numel() == 1 else value.double()


def _is_clip(node: Node) -> bool:
    rule = rule_of(node)
    refused = rule is not None and rule.refuse is not None and rule.refuse(node) is not None
    return rule is not None and rule.scale is ScaleRule.ABSORB and not refused


def _is_free(module: GraphModule, layer: Node) -> bool:
    """Whether a node is a layer with constant parameters, its weight read by nothing else."""
    rule = rule_of(layer)
    if rule is None or rule.weight is None or rule.bias is None or layer.kwargs:
        return False
    weight, bias = (layer.args[p] if len(layer.args) > p else None for p in (rule.weight, rule.bias))
    if constant(module, weight) is None or (bias is not None and constant(module, bias) is None):
        return False
    assert isinstance(weight, Node)
    return sum(len(n.users) for n in module.graph.nodes if n.op == "get_attr" and n.target == weight.target) == 1


def _channel_axis(module: GraphModule, layer: Node) -> int:
    """Return the axis of a layer's output that counts its channels: the last one for a linear layer over tokens."""
    rule, axes = OPS[layer.target], len(shape_of(layer))
    assert rule.weight is not None
    weight = constant(module, layer.args[rule.weight])
    assert weight is not None
    return 1 if weight.dim() == axes else axes - 1


def _by_channel(value: Tensor, shape: tuple[int, ...], axis: int) -> Tensor | None:
    """Return a constant as one value for each channel, None where it varies along another axis."""
    sizes = [1] * (len(shape) - value.dim()) + list(value.shape)
    fits = all(size == (shape[k] if k == axis else 1) for k, size in enumerate(sizes))
    return value.reshape(-1) if fits else None


def _move_clip(clip: Node, factor: float | Tensor, shift: float | Tensor) -> bool:
    """Move a clip behind a factor and a shift; return whether there is such a clip."""
    low, high = clip_bounds(clip)
    if isinstance(factor, Tensor) or isinstance(shift, Tensor):
        plain = isinf(high) and low == 0 and not isinstance(shift, Tensor) and shift == 0
        return plain and isinstance(factor, Tensor) and bool((factor > 0).all())
    ends = sorted((factor * low + shift, factor * high + shift))
    if ends == [0.0, inf]:
        clip.target, clip.args = aten.relu.default, (clip.args[0],)
    else:
        bounds: list[Any] = [None if isinf(end) else end for end in ends]
        clip.target, clip.args = aten.clamp.default, (clip.args[0], *bounds)
    clip.kwargs = {}
    return True


def _parameters(
    module: GraphModule, layer: Node, factor: float | Tensor, shift: float | Tensor
) -> tuple[Tensor, Tensor | None] | None:
    """Return the layer's new weight and bias; None where one is not finite, or a channel would have no weight left."""
    rule = OPS[layer.target]
    assert rule.weight is not None
    assert rule.bias is not None
    weight, bias = (
        constant(module, layer.args[position] if len(layer.args) > position else None)
        for position in (rule.weight, rule.bias)
    )
    assert weight is not None
    factors = torch.as_tensor(factor, dtype=torch.float64).expand(weight.shape[rule.channel_axis])
    scaled = (weight.double() * factors.reshape([-1] + [1] * (weight.dim() - 1))).to(weight.dtype)
    before = torch.zeros(len(factors)) if bias is None else bias
    moved = (before.double() * factors + shift).to(weight.dtype)
    # A factor that float32 rounds to 0 would leave a channel without a scale.
    if not (torch.isfinite(scaled).all() and torch.isfinite(moved).all() and factors.to(weight.dtype).all()):
        return None
    return scaled, None if bias is None and not moved.any() else moved


def _put(module: GraphModule, layer: Node, weight: Tensor, bias: Tensor | None) -> None:
    rule = OPS[layer.target]
    assert rule.weight is not None
    assert rule.bias is not None
    holder = layer.args[rule.weight]
    assert isinstance(holder, Node)
    path = str(holder.target)
    trainable = tensor_at(module, path).requires_grad
    set_parameter(module, layer, rule.weight, path, weight, trainable)
    if bias is not None:
        set_parameter(module, layer, rule.bias, bias_path(module, layer, path), bias, trainable)
