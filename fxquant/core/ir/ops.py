"""The op table: what every pass needs to know about an ATen overload, one row each.

Passes ask a row for properties (has a weight, keeps its scale, can be absorbed), never "is this a conv2d". An op
without a row is left in float, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from math import inf, prod
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from fxquant.core.ir.shapes import shape_of

aten = torch.ops.aten


class ScaleRule(Enum):
    """How the grid of an op's output relates to the grids of its inputs."""

    OWN = "own"
    """The output has a separate grid (arithmetic)."""
    KEEP = "keep"
    """The output holds input values or zeros only, so it lies on the input's grid (reshape, max pool, zero pad)."""
    SHARE = "share"
    """All inputs and the output must agree on one grid (concatenation)."""
    ABSORB = "absorb"
    """A clipping activation that disappears into the saturation of the quantizer behind it (ReLU, ReLU6)."""
    FLOAT = "float"
    """Computed in float."""


@dataclass(frozen=True)
class OpRule:
    """Properties of one ATen overload.

    Args:
        kind: word used by targets, lowering tables and reports.
        scale: how the output grid relates to the inputs.
        activations: argument positions that hold activation tensors or lists of them.
        weight: argument position of the weight, None without.
        bias: argument position of the bias, None without.
        channel_axis: axis of the weight that counts output channels.
        macs: multiply-accumulates of the node for the batch it was traced with; None where there are none.
        refuse: returns why this node is treated as a float op all the same, or None.
        is_view: whether the output is the input's memory seen in another shape, so that nothing is allocated.
        clips: lower and upper bound of a clipping activation: a number, or the name of the argument that gives it.
        adds: whether the op is the plain sum of its two operands, which the kernel that makes one of them may compute.
        pointwise: whether it is an activation function, element by element.
        factor: whether its values only scale others, so that the ends of their range matter most.
        homogeneous: whether `f(s x) = s f(x)` for every s > 0; true of every row that keeps the grid.
        unscalable: what an op that is not homogeneous does to a scaled input, as the end of a sentence.
    """

    kind: str
    scale: ScaleRule
    activations: tuple[int, ...] = (0,)
    weight: int | None = None
    bias: int | None = None
    channel_axis: int = 0
    macs: Callable[[Node], int] | None = None
    refuse: Callable[[Node], str | None] | None = None
    is_view: bool = False
    clips: tuple[float | str, float | str] | None = None
    adds: bool = False
    pointwise: bool = False
    factor: bool = False
    homogeneous: bool = False
    unscalable: str = "is not the same up to a factor when its input is scaled"

    @property
    def passes_factor(self) -> bool:
        """Whether a positive factor on the input comes out as the same factor on the output."""
        # An op that keeps the grid only moves values, picks among them, or adds zeros.
        return self.homogeneous or self.scale is ScaleRule.KEEP


def arguments(node: Node) -> dict[str, Any]:
    """Return every argument of an ATen node by its name in the schema, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    schema = node.target._schema.arguments
    values = {argument.name: argument.default_value for argument in schema}
    values.update(zip((argument.name for argument in schema), node.args, strict=False))
    return {**values, **node.kwargs}


def _conv_macs(node: Node) -> int:
    # Each output element sums over one filter: (in channels / groups) x kernel, the weight's shape without axis 0.
    return prod(shape_of(node)) * prod(shape_of(node.args[1])[1:])


def _product_macs(node: Node) -> int:
    return prod(shape_of(node)) * shape_of(node.args[0])[-1]


def needs_two_tensors(node: Node) -> str | None:
    """Return why an op on two operands stays in float: one is no activation, or is scaled; None if it need not."""
    tensors = [a for a in node.args[:2] if isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor)]
    if len(tensors) < 2 or any(tensor.op == "get_attr" for tensor in tensors):
        return "one operand is a constant"
    if node.kwargs.get("alpha", 1) != 1:
        return "the second operand is scaled"
    if (shape_of(tensors[0])[1:] == ()) != (shape_of(tensors[1])[1:] == ()):
        return "one operand is a scalar"
    return None


def _needs_spatial_mean(node: Node) -> str | None:
    axes = arguments(node)["dim"]
    if len(shape_of(node.args[0])) == 4 and isinstance(axes, list | tuple) and set(axes) in ({2, 3}, {-1, -2}):
        return None
    return "only a mean over both spatial axes has an integer kernel"


def _needs_global_output(node: Node) -> str | None:
    size = node.args[1]
    sizes = list(size) if isinstance(size, list | tuple) else [size]
    return None if all(s == 1 for s in sizes) else "only adaptive pooling to one pixel has an integer kernel"


def _needs_zero_fill(node: Node) -> str | None:
    given = arguments(node)
    if given.get("mode", "constant") != "constant" or given["value"] not in (0, None):
        return "only padding with zeros stays on the grid"
    return None


def _needs_given_bounds(node: Node) -> str | None:
    if len(node.all_input_nodes) > 1:
        return "its bounds are computed by the graph"
    low, high = clip_bounds(node)
    return "its lower bound lies above the upper one" if low > high else None


_CONV = OpRule("conv", ScaleRule.OWN, (0,), weight=1, bias=2, macs=_conv_macs)
_MATMUL = OpRule("matmul", ScaleRule.OWN, (0, 1), macs=_product_macs, unscalable="multiplies by another value")
_AVG_POOL = OpRule("avg_pool", ScaleRule.OWN, homogeneous=True)
_GLOBAL_POOL = OpRule("global_pool", ScaleRule.OWN, homogeneous=True)
_MAX_POOL = OpRule("max_pool", ScaleRule.KEEP)
_PAD = OpRule("pad", ScaleRule.KEEP, refuse=_needs_zero_fill)
_RESHAPE = OpRule("reshape", ScaleRule.KEEP, is_view=True)
_SLICE = OpRule("slice", ScaleRule.KEEP, is_view=True)
_TRANSPOSE = OpRule("transpose", ScaleRule.KEEP, is_view=True)
_CLIP = OpRule(
    "relu6",
    ScaleRule.ABSORB,
    refuse=_needs_given_bounds,
    clips=("min", "max"),
    unscalable="clips at a fixed value, which scaling would move",
)
_POINTWISE = OpRule("pointwise", ScaleRule.FLOAT, pointwise=True)
_SOFTMAX = OpRule("softmax", ScaleRule.FLOAT)
_SIGMOID = OpRule("sigmoid", ScaleRule.OWN, pointwise=True, factor=True)

OPS: dict[object, OpRule] = {
    aten.conv1d.default: _CONV,
    aten.conv1d.padding: _CONV,
    aten.conv2d.default: _CONV,
    aten.conv2d.padding: _CONV,
    aten.linear.default: OpRule("linear", ScaleRule.OWN, (0,), weight=1, bias=2, macs=_product_macs),
    aten.matmul.default: _MATMUL,
    aten.bmm.default: _MATMUL,
    aten.add.Tensor: OpRule(
        "add",
        ScaleRule.OWN,
        (0, 1),
        refuse=needs_two_tensors,
        adds=True,
        unscalable="adds another value that is not scaled along",
    ),
    aten.mul.Tensor: OpRule(
        "mul", ScaleRule.OWN, (0, 1), refuse=needs_two_tensors, unscalable="multiplies by another value"
    ),
    aten.cat.default: OpRule("cat", ScaleRule.SHARE, unscalable="joins other values that are not scaled along"),
    aten.avg_pool1d.default: _AVG_POOL,
    aten.avg_pool2d.default: _AVG_POOL,
    aten.adaptive_avg_pool2d.default: replace(_GLOBAL_POOL, refuse=_needs_global_output),
    aten.mean.dim: replace(_GLOBAL_POOL, refuse=_needs_spatial_mean),
    aten.max_pool1d.default: _MAX_POOL,
    aten.max_pool2d.default: _MAX_POOL,
    aten.pad.default: _PAD,
    aten.constant_pad_nd.default: _PAD,
    aten.slice.Tensor: _SLICE,
    aten.select.int: _SLICE,
    aten.view.default: _RESHAPE,
    aten.reshape.default: _RESHAPE,
    aten._unsafe_view.default: _RESHAPE,
    aten.flatten.using_ints: _RESHAPE,
    aten.unsqueeze.default: _RESHAPE,
    aten.squeeze.dim: _RESHAPE,
    aten.squeeze.dims: _RESHAPE,
    aten.permute.default: _TRANSPOSE,
    aten.transpose.int: _TRANSPOSE,
    aten.t.default: _TRANSPOSE,
    **dict.fromkeys(
        (aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec), OpRule("upsample_nearest", ScaleRule.KEEP)
    ),
    aten.pixel_shuffle.default: OpRule("pixel_shuffle", ScaleRule.KEEP),
    aten.pixel_unshuffle.default: OpRule("pixel_shuffle", ScaleRule.KEEP),
    aten.channel_shuffle.default: OpRule("channel_shuffle", ScaleRule.KEEP),
    aten.clone.default: replace(_RESHAPE, is_view=False),
    aten.contiguous.default: replace(_RESHAPE, is_view=False),
    aten.relu.default: OpRule("relu", ScaleRule.ABSORB, clips=(0.0, inf), homogeneous=True),
    aten.relu6.default: replace(_CLIP, refuse=None, clips=(0.0, 6.0)),
    aten.hardtanh.default: replace(_CLIP, refuse=None, clips=("min_val", "max_val")),
    aten.clamp.default: _CLIP,
    aten.hardswish.default: _POINTWISE,
    aten.silu.default: _POINTWISE,
    aten.gelu.default: _POINTWISE,
    aten.sigmoid.default: _SIGMOID,
    aten.hardsigmoid.default: replace(_SIGMOID, kind="hard_sigmoid"),
    aten.softmax.int: _SOFTMAX,
    aten._softmax.default: _SOFTMAX,
    aten.layer_norm.default: OpRule("layer_norm", ScaleRule.FLOAT, unscalable="takes the scale out again"),
}
"""ATen overload -> its row."""

RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
"""Layers over a sequence: `(input, first states, parameters, has_biases, layers, dropout, train, bidirectional,
batch_first)`."""

REFUSED: dict[object, str] = {
    aten.embedding.default: "a table look-up does no arithmetic; its rows stay in float",
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input),
        "with both stride and dilation, or a computed weight, a transposed convolution has no integer form",
    ),
    **dict.fromkeys(
        (aten.conv3d.default, aten.conv3d.padding),
        "groups of fewer than 8 channels, free sizes or a computed weight: no integer form of 3-d convolution is fast",
    ),
    aten.conv_transpose3d.input: (
        "groups of fewer than 8 channels, free sizes, a computed weight, or both stride and dilation: no integer form "
        "of 3-d transposed convolution is fast"
    ),
    **dict.fromkeys(RECURRENT, "a recurrent layer runs in float: every step waits for the one before it"),
    **dict.fromkeys(
        (aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default),
        "the weights are computed by the graph; with parameters it would run as two linear layers and gates",
    ),
    aten.bilinear.default: "its weight is computed by the graph; with a parameter it would run as a linear layer",
    aten.einsum.default: "a product written as einsum runs in float; write torch.nn.functional.linear or torch.matmul",
    aten.addmm.default: "the weight is an operand, not a parameter of linear; write torch.nn.functional.linear",
    aten.scaled_dot_product_attention.default: "fused attention runs in float",
}
"""Ops that hold weights or do most of the work, and why they are left in float."""


_NORM = "it divides by the deviation of its own input, for which no runtime here has an integer kernel"
SINGLE = "a function of single values: on integers where the runtime has a table or kernel, else between conversions"

BETWEEN: dict[object, str] = {
    aten.group_norm.default: _NORM,
    aten.instance_norm.default: _NORM,
    aten.upsample_bilinear2d.vec: (
        "bilinear interpolation of integers cuts off, not rounds, and takes 2 to 13 times as long in ONNX Runtime"
    ),
    aten.avg_pool3d.default: "an average of several slices would be rounded twice, within slices and over them",
    aten.adaptive_avg_pool3d.default: "of free sizes, no number of slices to average over is known",
    aten.upsample_trilinear3d.vec: "interpolation between pixels of integers cuts off where it has to round",
    aten.upsample_nearest3d.vec: "its factor along depth is no whole number, or the sizes are free",
    aten.max_pool3d.default: "of free sizes, slices cannot be taken apart",
    aten.leaky_relu.default: SINGLE,
    aten.prelu.default: SINGLE,
}
"""Ops without weights and without a row that run in float between two integer layers, and why."""

STORED: dict[object, str] = {
    aten.embedding.default: "embedding",
    aten.conv3d.default: "conv3d",
    aten.conv3d.padding: "conv3d",
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), "conv_transpose"
    ),
    aten.lstm.input: "lstm",
    aten.gru.input: "gru",
    aten.rnn_tanh.input: "rnn",
    aten.rnn_relu.input: "rnn",
    aten.bilinear.default: "bilinear",
    aten.einsum.default: "einsum",
}
"""Ops that compute in float with weights that are stored in a format of their own, and the kind of such a site."""


def stored_weights(node: Node) -> list[Node]:
    """Return the parameters of an op of `STORED` that count as its weights: float32, of at least two axes."""
    if node.target not in STORED:
        return []
    constants = [(source, source.meta.get("val")) for source in node.all_input_nodes if source.op == "get_attr"]
    return [
        source
        for source, value in constants
        if isinstance(value, torch.Tensor) and value.dim() >= 2 and value.dtype == torch.float32
    ]


def rule_of(node: Node) -> OpRule | None:
    """Return the row of a node, None for ops without one; a refused node gets a float row of its kind."""
    if node.op != "call_function":
        return None
    rule = OPS.get(node.target)
    if rule is not None and rule.refuse is not None and rule.refuse(node) is not None:
        return OpRule(rule.kind, ScaleRule.FLOAT, rule.activations, unscalable=rule.unscalable)
    return rule


def clip_bounds(node: Node) -> tuple[float, float]:
    """Return the bounds in real units to which a clipping activation clips, infinite where it is open."""
    clips = OPS[node.target].clips
    assert clips is not None
    given = arguments(node)
    low, high = (given[bound] if isinstance(bound, str) else bound for bound in clips)
    return (float(low) if isinstance(low, int | float) else -inf, float(high) if isinstance(high, int | float) else inf)


def activation_inputs(node: Node) -> tuple[Node, ...]:
    """Return the nodes whose values enter as activations, lists flattened, in argument order."""
    rule = rule_of(node)
    positions = rule.activations if rule is not None else range(len(node.args))
    found: list[Node] = []
    for position in positions:
        argument = node.args[position] if position < len(node.args) else None
        members = argument if isinstance(argument, list | tuple) else [argument]
        found.extend(member for member in members if isinstance(member, Node))
    return tuple(found)
