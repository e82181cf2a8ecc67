"""What ops outside the op table do to factors of channels."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxquant.core.ir import OpRule, ScaleRule, activation_inputs

aten = torch.ops.aten

MOVES = {
    aten.alias.default,
    aten.chunk.default,
    aten.expand.default,
    aten.flip.default,
    aten.index_select.default,
    aten.movedim.int,
    aten.narrow.default,
    aten.repeat.default,
    aten.roll.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.default,
    aten.stack.default,
    aten.tensor_split.sections,
    aten.unbind.int,
    aten.unflatten.int,
}
"""Ops that only move values, beside those of the op table that keep the grid."""

ELEMENTWISE = {aten.leaky_relu.default, aten.prelu.default, aten.neg.default, aten.abs.default}
"""Functions of single values with `f(s x) = s f(x)` for s > 0, beside those of the op table."""

RESAMPLES = {
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
    aten.upsample_linear1d.vec,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.max_pool2d_with_indices.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
}
"""Ops that mix the positions of each channel, and no channels."""

REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default}
"""Ops that mix the elements along the axes `dim`."""

NORMALIZATIONS: dict[object, int | None] = {
    aten.layer_norm.default: None,
    aten.group_norm.default: 1,
    aten.instance_norm.default: 1,
    aten._native_batch_norm_legit_no_training.default: 1,
}
"""Normalization with weight and bias -> the axis they count; None where they have the last axes' shape."""


def moves(node: Node, rule: OpRule | None) -> bool:
    """Whether an op only moves values, picks among them or joins them."""
    if rule is not None and rule.scale in (ScaleRule.KEEP, ScaleRule.SHARE):
        return bool(activation_inputs(node))
    return node.target in MOVES or getattr(node.target, "__name__", "") == "getitem"
