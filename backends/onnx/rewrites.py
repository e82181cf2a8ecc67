"""Rewrites of an explicit integer graph that only ONNX Runtime needs, still in FX.

The rules behind them were found in optimized graphs (onnxruntime 1.31): what fuses, and what silently does not.
"""

from __future__ import annotations

from math import isinf
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from fxquant.backends.qdq_ops import dequantize, dequantize_channels, quantize, stored_channels
from fxquant.core.ir import OPS, ScaleRule, clip_bounds, constant, erase_dead, finish, is_constant, shape_of

aten = torch.ops.aten

PADS = (aten.pad.default, aten.constant_pad_nd.default)
CONVS = (aten.conv1d.default, aten.conv2d.default)
MOVES = (aten.slice.Tensor, aten.cat.default)
SPATIAL = ({2, 3}, {-2, -1})
BARRED = (
    *(*CONVS, aten.conv1d.padding, aten.conv2d.padding, aten.linear.default),
    *(aten.conv3d.default, aten.conv3d.padding),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
)


def padded_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int], groups: int
) -> Tensor:
    """Return a 1-d or 2-d convolution whose sides may be padded unequally.

    Args:
        pads: zeros before each spatial axis, then zeros behind each (the order of ONNX).
    """
    half = len(pads) // 2
    order = [side for axis in reversed(range(half)) for side in (pads[axis], pads[axis + half])]
    conv = functional.conv1d if half == 1 else functional.conv2d
    result: Tensor = conv(functional.pad(x, order), weight, bias, stride, 0, dilation, groups)
    return result


def pad_integers(q: Tensor, pad: list[int], zero_point: Tensor) -> Tensor:
    """Return a quantized tensor padded with its zero-point; `pad` as in torch.nn.functional.pad."""
    return functional.pad(q.to(torch.int32), pad, value=int(zero_point)).to(q.dtype)


def barrier(x: Tensor) -> Tensor:
    """Return x; keeps a runtime from fusing what is on either side."""
    return x


def fuse_integers(module: GraphModule, matrices: bool = True) -> GraphModule:
    """Rewrite an explicit integer graph in place so that ONNX Runtime fuses all of it, and return it.

    Args:
        module: explicit integer graph.
        matrices: whether linear layers of more than two axes are computed on a matrix, see `_flatten_linear`.
    """
    for node in list(module.graph.nodes):
        if node.target is aten.mean.dim:
            _keep_pooled_axes(node)
    for node in list(module.graph.nodes):
        if node.target in MOVES:
            _close_grid(node)
    for node in list(module.graph.nodes):
        if node.target in CONVS and isinstance(node.args[0], Node):
            _fold_pad(module, node)
    for node in list(module.graph.nodes):
        if node.target in PADS:
            _pad_on_integers(node)
    for node in list(module.graph.nodes):
        if matrices and node.target is aten.linear.default:
            _flatten_linear(node)
    for node in list(module.graph.nodes):
        if node.target is quantize:
            _clip_integers(module, node)
    if any(node.target is quantize for node in module.graph.nodes):
        for node in list(module.graph.nodes):
            if node.target in BARRED:
                _bar(node)
            if node.target is aten.linear.default:
                _bar_clip(node)
    erase_dead(module)
    return finish(module)


def argument(node: Node, position: int, default: Any) -> Any:
    """Return a positional argument of a node, or its default."""
    return node.args[position] if len(node.args) > position else default


def spread(value: Any, count: int) -> list[int]:
    """Return an int or a list of one as a list of `count` ints."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [int(v) for v in (values * count if len(values) == 1 else values)]


def _keep_pooled_axes(node: Node) -> None:
    """Pool to one pixel and drop the axes behind the quantizer: the integer pooling kernel keeps them."""
    source, axes = node.args[0], node.args[1]
    users = list(node.users)
    if not isinstance(source, Node) or argument(node, 2, False) or argument(node, 3, None) or node.kwargs:
        return
    if len(shape_of(source)) != 4 or not isinstance(axes, list | tuple) or set(axes) not in SPATIAL:
        return
    graph, value = node.graph, node.meta["val"]
    q = users[0] if len(users) == 1 and users[0].target is quantize else None
    # The quantizer's scale is read right in front of it, behind the pooling.
    with graph.inserting_before(q or node):
        pooled = graph.call_function(aten.mean.dim, (source, [2, 3], True))
        pooled.meta = {**node.meta, "val": value[:, :, None, None]}
        kept = pooled
        if q is not None:
            integers = graph.call_function(quantize, (pooled, *q.args[1:]))
            integers.meta = {**node.meta, "val": value[:, :, None, None].to(torch.uint8)}
            kept = graph.call_function(dequantize, (integers, *q.args[1:3]))
            kept.meta = dict(pooled.meta)
        flat = graph.call_function(aten.reshape.default, (kept, [-1, shape_of(node)[1]]))
        flat.meta = dict(node.meta)
    node.replace_all_uses_with(flat)
    graph.erase_node(node)


def _clip_integers(module: GraphModule, node: Node) -> None:
    """Let a quantizer do the clipping of the activation in front of it.

    Rounding is monotonic, so `quantize(clip(x, a, b)) = clip(quantize(x), quantize(a), quantize(b))` exactly. A clip
    that no saturation covers (ReLU into a grid with negative values) would leave the layer in front in float.
    """
    clip, scale_node, zero_node, qmin, qmax = node.args
    assert isinstance(clip, Node)
    scale, zero_point = constant(module, scale_node), constant(module, zero_node)
    rule = OPS.get(clip.target)
    if scale is None or zero_point is None or rule is None or rule.scale is not ScaleRule.ABSORB:
        return
    if len(clip.users) != 1 or (rule.refuse is not None and rule.refuse(clip) is not None):
        return
    assert isinstance(qmin, int)
    assert isinstance(qmax, int)
    ends = zip(clip_bounds(clip), (qmin, qmax), strict=True)
    clipped = [
        open_end if isinf(end) else int(quantize(torch.tensor(end), scale, zero_point, qmin, qmax))
        for end, open_end in ends
    ]
    node.args = (clip.args[0], scale_node, zero_node, *clipped)


def _flatten_linear(node: Node) -> None:
    """Compute an integer linear layer of more than two axes on a matrix.

    ONNX Runtime fuses the matrix form with its bias to one kernel; MatMul and Add stay two, with a dequantized bias.
    """
    source, weight = node.args[:2]
    if not isinstance(source, Node) or source.target is not dequantize or len(shape_of(source)) < 3:
        return
    shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if not isinstance(weight, Node) or weight.target is not dequantize_channels or shape.count(-1) > 1:
        return
    graph, q = node.graph, source.args[0]
    assert isinstance(q, Node)
    with graph.inserting_before(node):
        rows = graph.call_function(aten.reshape.default, (q, [-1, shape_of(source)[-1]]))
        rows.meta = {**source.meta, "val": q.meta["val"].flatten(0, -2)}
        matrix = graph.call_function(dequantize, (rows, *source.args[1:]))
        matrix.meta = {**source.meta, "val": source.meta["val"].flatten(0, -2)}
    with graph.inserting_after(node):
        result = graph.call_function(aten.reshape.default, (node, shape))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result, lambda user: user is not result)
    node.args = (matrix, *node.args[1:])
    node.meta = {**node.meta, "val": node.meta["val"].flatten(0, -2)}


def _zero_pad(node: Node) -> list[int] | None:
    """Return the pad widths of a node that pads with zeros."""
    rule = OPS.get(node.target)
    if rule is None or rule.scale is not ScaleRule.KEEP or rule.refuse is None or rule.refuse(node) is not None:
        return None
    widths = node.args[1]
    ints = [w for w in widths if isinstance(w, int) and w >= 0] if isinstance(widths, list | tuple) else []
    return ints if isinstance(widths, list | tuple) and len(ints) == len(widths) else None


def _behind_quantizers(node: Node) -> tuple[Node, Node | None]:
    """Return what a node's value was before dequantize(quantize(...)), and that dequantize."""
    if node.target is dequantize:
        q = node.args[0]
        if isinstance(q, Node) and q.target is quantize and isinstance(q.args[0], Node):
            return q.args[0], node
    return node, None


def _fold_pad(module: GraphModule, conv: Node) -> None:
    """Let a convolution pad by itself: a Pad between DequantizeLinear and QuantizeLinear runs in float."""
    weight = conv.args[1]
    assert isinstance(conv.args[0], Node)
    assert isinstance(weight, Node)
    pad, quantized = _behind_quantizers(conv.args[0])
    axes = len(shape_of(weight)) - 2
    if pad.target not in PADS or (widths := _zero_pad(pad)) is None or any(widths[2 * axes :]):
        return
    source = pad.args[0]
    assert isinstance(source, Node)
    if quantized is not None and (source.target is not dequantize or not _same_grid(module, source, quantized)):
        return
    padding = spread(argument(conv, 4, 0), axes)
    widths = widths + [0] * (2 * axes - len(widths))
    # torch lists the last axis first, and both sides of an axis together.
    before = [widths[2 * (axes - 1 - axis)] + padding[axis] for axis in range(axes)]
    behind = [widths[2 * (axes - 1 - axis) + 1] + padding[axis] for axis in range(axes)]
    stride, dilation = spread(argument(conv, 3, 1), axes), spread(argument(conv, 5, 1), axes)
    conv.target = padded_conv
    conv.args = (source, weight, argument(conv, 2, None), stride, before + behind, dilation, argument(conv, 6, 1))


def _same_grid(module: GraphModule, one: Node, other: Node) -> bool:
    """Whether two dequantize nodes use equal scales and zero-points."""
    pairs = zip(one.args[1:3], other.args[1:3], strict=True)
    values = [(constant(module, a), constant(module, b)) for a, b in pairs]
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in values)


def _close_grid(node: Node) -> None:
    """Put a quantizer of the same grid behind what only moves values of one grid; it changes no number.

    ONNX Runtime joins slices to a Split, looks for an integer Concat before it moves a Split to integers, and takes
    none whose values are read in float as well.
    """
    sources = node.all_input_nodes
    if any(source.target is not dequantize for source in sources):
        return
    first = sources[0]
    if not all(_same_grid_nodes(source, first) for source in sources[1:]):
        return
    readers = [user for user in node.users if not (user.target is quantize and _same_grid_nodes(user, first))]
    if not readers:
        return
    scale, zero_point = first.args[1:]
    with node.graph.inserting_after(node):
        integers = node.graph.call_function(quantize, (node, scale, zero_point, 0, 255))
    with node.graph.inserting_after(integers):
        result = node.graph.call_function(dequantize, (integers, scale, zero_point))
    integers.meta = {**node.meta, "val": node.meta["val"].to(torch.uint8)}
    result.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, result)


def _pad_on_integers(pad: Node) -> None:
    """Move zero padding between quantize and dequantize: there it is a copy of bytes."""
    widths, source = _zero_pad(pad), pad.args[0]
    if widths is None or not isinstance(source, Node) or source.target is not dequantize:
        return
    graph = pad.graph
    q, scale, zero_point = source.args
    with graph.inserting_before(pad):
        padded = graph.call_function(pad_integers, (q, widths, zero_point))
        padded.meta = {**pad.meta, "val": pad.meta["val"].to(torch.uint8)}
        result = graph.call_function(dequantize, (padded, scale, zero_point))
        result.meta = dict(pad.meta)
    for user in list(pad.users):
        # The quantizer behind the padding has the same grid, so its answer is the padded integers themselves.
        if user.target is quantize and _same_grid_nodes(user, source):
            user.replace_all_uses_with(padded)
            graph.erase_node(user)
    pad.replace_all_uses_with(result)
    graph.erase_node(pad)


def _same_grid_nodes(one: Node, other: Node) -> bool:
    module = one.graph.owning_module
    return isinstance(module, GraphModule) and _same_grid(module, one, other)


def _bar(node: Node) -> None:
    """Put a barrier between a float layer and the quantizer behind it.

    ONNX Runtime quantizes a float layer between DequantizeLinear and QuantizeLinear to int8 with one scale
    per tensor, unasked; a layer that is kept in float must stay so.
    """
    weight = node.args[1]
    if not isinstance(weight, Node) or (weight.target is not stored_channels and not is_constant(weight)):
        return
    value = _clipped(node)
    readers = [user for user in value.users if user.target is quantize]
    if not readers:
        return
    with node.graph.inserting_after(value):
        bar = node.graph.call_function(barrier, (value,))
    bar.meta = dict(value.meta)
    for reader in readers:
        reader.replace_input_with(value, bar)


def _bar_clip(node: Node) -> None:
    """Put a barrier between an integer layer and its clip where no quantizer reads that.

    ONNX Runtime joins Gemm and the clip before it looks for integer layers, and has no integer layer with a clip that
    writes floats.
    """
    weight, value = node.args[1], _clipped(node)
    quantized = isinstance(weight, Node) and weight.target is dequantize_channels
    if not quantized or value is node or any(user.target is quantize for user in value.users):
        return
    (reader,) = node.users
    with node.graph.inserting_after(node):
        bar = node.graph.call_function(barrier, (node,))
    bar.meta = dict(node.meta)
    reader.replace_input_with(node, bar)


def _clipped(node: Node) -> Node:
    """Return the clipping activation that alone reads a node, or the node itself."""
    users = list(node.users)
    rule = OPS.get(users[0].target) if len(users) == 1 else None
    return _clipped(users[0]) if rule is not None and rule.scale is ScaleRule.ABSORB else node
