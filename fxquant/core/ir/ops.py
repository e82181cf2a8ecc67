"""The op table: what every pass needs to know about an ATen overload, one row each.

Passes ask a row for properties (has a weight, keeps its scale, can be absorbed), never "is this a conv2d". An op
without a row is left in float, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import prod

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten


class ScaleRule(Enum):
    """How the grid of an op's output relates to the grids of its inputs."""

    OWN = "own"
    """The output has a grid of its own (arithmetic)."""
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
        kind: word used by targets and reports.
        scale: how the output grid relates to the inputs.
        activations: argument positions that hold activation tensors or lists of them.
        weight: argument position of the weight, None without.
        bias: argument position of the bias, None without.
        channel_axis: axis of the weight that counts output channels.
        macs: multiply-accumulates of the node for the batch it was traced with; None where there are none.
        refuse: returns why this node is treated as a float op all the same, or None.
        shares: whether the output is the input's memory seen in another shape, so that nothing is allocated.
    """

    kind: str
    scale: ScaleRule
    activations: tuple[int, ...] = (0,)
    weight: int | None = None
    bias: int | None = None
    channel_axis: int = 0
    macs: Callable[[Node], int] | None = None
    refuse: Callable[[Node], str | None] | None = None
    shares: bool = False


def shape_of(node: object) -> tuple[int, ...]:
    """Return the traced shape of a node's tensor, the dynamic batch counted as traced (its hint)."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(_hint(size) for size in value.shape)


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1


def images_axis(node: Node) -> int | None:
    """Return the axis of a node's tensor that counts images, None where they do not show."""
    return next((k for k, size in enumerate(node.meta["val"].shape) if not isinstance(size, int)), None)


def traced_images(graph: Graph) -> int:
    """Return the images the graph was traced with; an op in the middle may hold them on any axis."""
    shapes = [shape_of(node) for node in graph.nodes if node.op == "placeholder"]
    return next((shape[0] for shape in shapes if shape and shape[0] > 0), 1)


def sample_shape(node: Node) -> tuple[int, ...]:
    """Return the shape of a node's tensor for one image, wherever the images are among its axes."""
    return _one_of(node.meta.get("val"), node.graph)


def _one_of(value: object, graph: Graph) -> tuple[int, ...]:
    sizes = value.shape if isinstance(value, torch.Tensor) else ()
    images, counted_in = traced_images(graph), _images_symbols(graph)

    def of_one(size: int | torch.SymInt) -> int:
        # A free height or width is no number of images.
        counts = not isinstance(size, int) and (not counted_in or bool(counted_in & _symbols(size)))
        return max(1, _hint(size) // images) if counts else _hint(size)

    return tuple(of_one(size) for size in sizes)


def _images_symbols(graph: Graph) -> set[object]:
    """Return the symbols in which the number of images is counted."""
    values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    sizes = [value.shape[0] for value in values if isinstance(value, torch.Tensor) and value.dim()]
    return {symbol for size in sizes for symbol in _symbols(size)}


def _symbols(size: int | torch.SymInt) -> set[object]:
    return set() if isinstance(size, int) else set(size.node.expr.free_symbols)


def sample_elements(node: Node) -> tuple[int, int]:
    """Return how many elements a node makes for one image, all its tensors together, and the bytes of the widest.

    Floating-point numbers count as float32, the yardstick, whatever type the parameters happen to have.
    """
    value = node.meta.get("val")
    tensors = [t for t in (value if isinstance(value, tuple | list) else [value]) if isinstance(t, torch.Tensor)]
    widest = max((4 if t.is_floating_point() else t.element_size() for t in tensors), default=0)
    return sum(prod(_one_of(tensor, node.graph)) for tensor in tensors), widest


def _conv_macs(node: Node) -> int:
    # Each output element sums over one filter: (in channels / groups) x kernel, the weight's shape without axis 0.
    return prod(shape_of(node)) * prod(shape_of(node.args[1])[1:])


def _linear_macs(node: Node) -> int:
    return prod(shape_of(node)) * shape_of(node.args[1])[-1]


def _matmul_macs(node: Node) -> int:
    return prod(shape_of(node)) * shape_of(node.args[0])[-1]


def _needs_two_tensors(node: Node) -> str | None:
    tensors = [a for a in node.args[:2] if isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor)]
    if len(tensors) < 2 or any(tensor.op == "get_attr" for tensor in tensors):
        return "one operand is a constant"
    if node.kwargs.get("alpha", 1) != 1:
        return "the second operand is scaled"
    if (shape_of(tensors[0])[1:] == ()) != (shape_of(tensors[1])[1:] == ()):
        return "one operand is a scalar"
    return None


def _needs_spatial_mean(node: Node) -> str | None:
    shape = shape_of(node.args[0])
    axes = node.args[1] if len(node.args) > 1 else None
    if len(shape) == 4 and isinstance(axes, list | tuple) and list(axes) in ([2, 3], [-2, -1], [-1, -2], [3, 2]):
        return None
    return "only a mean over both spatial axes has an integer kernel"


def _needs_global_output(node: Node) -> str | None:
    size = node.args[1]
    sizes = list(size) if isinstance(size, list | tuple) else [size]
    return None if all(s == 1 for s in sizes) else "only adaptive pooling to one pixel has an integer kernel"


def _needs_zero_fill(node: Node) -> str | None:
    mode = node.args[2] if len(node.args) > 2 and isinstance(node.args[2], str) else "constant"
    value = node.args[-1] if len(node.args) > 2 and not isinstance(node.args[-1], str) else 0
    if mode != "constant" or value not in (0, 0.0, None):
        return "only padding with zeros stays on the grid"
    return None


def _needs_clip_at_zero(node: Node) -> str | None:
    low = node.args[1] if len(node.args) > 1 else -1.0
    return None if low in (0, 0.0) else "only a clip that starts at zero disappears into a quantizer"


_KEEP = OpRule("reshape", ScaleRule.KEEP, shares=True)
POINTWISE = "pointwise"
"""Kind of the activation functions that are computed in float, element by element."""

_FLOAT = OpRule(POINTWISE, ScaleRule.FLOAT)
_CONV = OpRule("conv", ScaleRule.OWN, (0,), weight=1, bias=2, macs=_conv_macs)
_MATMUL = OpRule("matmul", ScaleRule.OWN, (0, 1), macs=_matmul_macs)

OPS: dict[object, OpRule] = {
    aten.conv1d.default: _CONV,
    aten.conv1d.padding: _CONV,
    aten.conv2d.default: _CONV,
    aten.conv2d.padding: _CONV,
    aten.linear.default: OpRule("linear", ScaleRule.OWN, (0,), weight=1, bias=2, macs=_linear_macs),
    aten.matmul.default: _MATMUL,
    aten.bmm.default: _MATMUL,
    aten.add.Tensor: OpRule("add", ScaleRule.OWN, (0, 1), refuse=_needs_two_tensors),
    aten.mul.Tensor: OpRule("mul", ScaleRule.OWN, (0, 1), refuse=_needs_two_tensors),
    aten.cat.default: OpRule("cat", ScaleRule.SHARE),
    aten.avg_pool1d.default: OpRule("avg_pool", ScaleRule.OWN),
    aten.avg_pool2d.default: OpRule("avg_pool", ScaleRule.OWN),
    aten.adaptive_avg_pool2d.default: OpRule("global_pool", ScaleRule.OWN, refuse=_needs_global_output),
    aten.mean.dim: OpRule("global_pool", ScaleRule.OWN, refuse=_needs_spatial_mean),
    aten.max_pool1d.default: OpRule("max_pool", ScaleRule.KEEP),
    aten.max_pool2d.default: OpRule("max_pool", ScaleRule.KEEP),
    aten.pad.default: OpRule("pad", ScaleRule.KEEP, refuse=_needs_zero_fill),
    aten.constant_pad_nd.default: OpRule("pad", ScaleRule.KEEP, refuse=_needs_zero_fill),
    aten.slice.Tensor: OpRule("slice", ScaleRule.KEEP, shares=True),
    aten.select.int: OpRule("slice", ScaleRule.KEEP, shares=True),
    aten.view.default: _KEEP,
    aten.reshape.default: _KEEP,
    aten._unsafe_view.default: _KEEP,
    aten.flatten.using_ints: _KEEP,
    aten.unsqueeze.default: _KEEP,
    aten.squeeze.dim: _KEEP,
    aten.squeeze.dims: _KEEP,
    aten.permute.default: OpRule("transpose", ScaleRule.KEEP, shares=True),
    aten.transpose.int: OpRule("transpose", ScaleRule.KEEP, shares=True),
    aten.t.default: OpRule("transpose", ScaleRule.KEEP, shares=True),
    aten.clone.default: OpRule("reshape", ScaleRule.KEEP),
    aten.contiguous.default: OpRule("reshape", ScaleRule.KEEP),
    aten.relu.default: OpRule("relu", ScaleRule.ABSORB),
    aten.relu6.default: OpRule("relu6", ScaleRule.ABSORB),
    aten.hardtanh.default: OpRule("relu6", ScaleRule.ABSORB, refuse=_needs_clip_at_zero),
    aten.clamp.default: OpRule("relu6", ScaleRule.ABSORB, refuse=_needs_clip_at_zero),
    aten.hardswish.default: _FLOAT,
    aten.silu.default: _FLOAT,
    aten.gelu.default: _FLOAT,
    aten.sigmoid.default: _FLOAT,
    aten.hardsigmoid.default: _FLOAT,
    aten.softmax.int: OpRule("softmax", ScaleRule.FLOAT),
    aten._softmax.default: OpRule("softmax", ScaleRule.FLOAT),
    aten.layer_norm.default: OpRule("layer_norm", ScaleRule.FLOAT),
}
"""ATen overload -> its row."""

REFUSED: dict[object, str] = {
    aten.embedding.default: "a table look-up does no arithmetic; its rows stay in float",
    aten.conv_transpose1d.default: "no runtime here has an integer transposed convolution",
    aten.conv_transpose2d.input: "no runtime here has an integer transposed convolution",
    aten.conv3d.default: "3-d convolution has no integer kernel here",
    aten.conv_transpose3d.input: "no runtime here has an integer transposed convolution",
    **dict.fromkeys(
        (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input),
        "a recurrent layer runs in float: every step waits for the one before it",
    ),
    aten.bilinear.default: "no runtime here has an integer bilinear layer",
    aten.einsum.default: "a product written as einsum runs in float; write torch.nn.functional.linear or torch.matmul",
    aten.addmm.default: "the weight is an operand, not a parameter of linear; write torch.nn.functional.linear",
    aten.baddbmm.default: "batched matrix product with bias has no integer kernel here",
    aten.scaled_dot_product_attention.default: "fused attention runs in float",
}
"""Ops that hold weights or do most of the work, and why they are left in float."""


def rule_of(node: Node) -> OpRule | None:
    """Return the row of a node, None for ops without one; a refused node gets a float row of its kind."""
    if node.op != "call_function":
        return None
    rule = OPS.get(node.target)
    if rule is not None and rule.refuse is not None and rule.refuse(node) is not None:
        return OpRule(rule.kind, ScaleRule.FLOAT, rule.activations)
    return rule


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
