"""Rewrite 3-d convolutions and pools as 2-d ones, for which every runtime has fast integer kernels.

With kernel depth K, stride s and dilation d along depth, slice t of the output reads the K input slices s t + d k:

    y[:, t] = sum_k conv2d(x[:, s t + d k], W[:, :, k]) = conv2d(concatenated x[:, s t + d k], concatenated W[:, :, k]),

one convolution of K times the channels, over as many images as there are output slices: its sums are whole, so its
integers are those of the 3-d convolution. A kernel that reads along depth alone is a 2-d convolution over depth and
all pixels. Max pooling takes the maximum over pixels first and over depth next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.core.ir import Program, arguments, erase_dead, is_constant, shape_of, trace
from fxquant.passes.base import Pass
from fxquant.passes.new_form import SWAP, Made, NewForm, integers, pays_as_planes, rewrite_all
from fxquant.passes.volume_moves import apart, join_moves, together

aten = torch.ops.aten

LAYERS = (aten.conv3d.default, aten.conv3d.padding)


@dataclass(frozen=True)
class RewriteVolumes(Pass):
    """Rewrite every 3-d convolution whose weight is a parameter as a 2-d one where that pays, and 3-d pools and
    nearest interpolations as 2-d ones where they have such a form.

    The batch norm and the clip behind a convolution move in front of what brings its slices together, so that they are
    folded and absorbed as behind any convolution.
    """

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program without 3-d layers."""
        module = program.module
        changed = rewrite_all(
            _Layer(module, node) for node in module.graph.nodes if node.target in LAYERS and _has_form(node)
        )
        pools = [node for node in module.graph.nodes if node.target in POOLS and _is_volume(node)]
        changed += sum(POOLS[node.target](NewForm(module, node, ("planes",), {}, set())) for node in pools)
        if changed:
            join_moves(module)
        erase_dead(module)
        return program, changed


def _is_volume(node: Node) -> bool:
    """Whether a node's input is images of channels, depth, height and width, the last four known."""
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, Node) else None
    return isinstance(value, Tensor) and value.dim() == 5 and all(isinstance(size, int) for size in value.shape[1:])


def _has_form(node: Node) -> bool:
    given = arguments(node)
    if not _is_volume(node) or not is_constant(given["weight"]):
        return False
    if not (given["bias"] is None or is_constant(given["bias"])):
        return False
    outputs, inputs, depth, *pixels = shape_of(given["weight"])
    groups = int(given["groups"])
    # A depthwise 2-d convolution has a kernel of its own.
    depthwise = inputs == 1 and outputs == groups and (depth == 1 or set(pixels) == {1})
    return depthwise or pays_as_planes(inputs * groups, groups)


class _Layer:
    """A 3-d convolution of a graph.

    Args:
        module: a fork that holds it.
        node: the convolution.
    """

    def __init__(self, module: GraphModule, node: Node) -> None:
        self.module, self.node, given = module, node, arguments(node)
        self.kernel = shape_of(given["weight"])[2:]
        self.stride, self.dilation = integers(given["stride"], 3), integers(given["dilation"], 3)
        spread = [(k - 1) * d for k, d in zip(self.kernel, self.dilation, strict=True)]
        if isinstance(given["padding"], str):
            total = spread if given["padding"] == "same" else [0, 0, 0]
            self.pads = [(t // 2, t - t // 2) for t in total]
        else:
            self.pads = [(p, p) for p in integers(given["padding"], 3)]
        self.groups = int(given["groups"])
        pixels = [(k, s, *p) for k, s, p in zip(self.kernel, self.stride, self.pads, strict=True)][1:]
        #: whether only slices are read together, never neighbouring pixels
        self.along_depth = set(pixels) == {(1, 1, 0, 0)}
        self.form: tuple[object, ...] = ("planes", self.along_depth, self.groups)

    def rewrite(self, made: Made, leaving: set[Node]) -> None:
        """Replace the convolution and what moves in front of what brings its slices together.

        Args:
            made: parameters that have their new form already; added to.
            leaving: convolutions of this form, which will not read their parameters any more.
        """
        # Read now: the layer in front may have been rewritten.
        given, form = arguments(self.node), NewForm(self.module, self.node, self.form, made, leaving)
        out = list(shape_of(self.node)[1:])
        if self.along_depth:
            source = self._column(form, given["input"])
            stride, padding, dilation = [self.stride[0], 1], [self._even(0), 0], [self.dilation[0], 1]
        else:
            source = self._slices(form, given["input"], out[1])
            stride, padding, dilation = self.stride[1:], [self._even(1), self._even(2)], self.dilation[1:]
        operands = (source, given["weight"], given["bias"], stride, padding, dilation, self.groups)
        conv = form.insert(self.node, aten.conv2d.default, operands)
        form.change(conv, 1, self._planes)
        value, last = form.moved(trace(conv))
        volumes = form.op(aten.reshape.default, value, [-1, *out]) if self.along_depth else None
        form.replace(last, volumes or together(form.op, value, out[1]))

    def _even(self, axis: int) -> int:
        """Return the zeros that the 2-d convolution adds by itself on either side, 0 where the sides differ."""
        before, behind = self.pads[axis]
        return before if before == behind else 0

    def _planes(self, weight: Tensor) -> Tensor:
        """Return the 2-d convolution's weight: inputs in the order (slice, channel)."""
        if self.along_depth:
            return weight.squeeze(-1)
        return weight.transpose(1, 2).flatten(1, 2).contiguous()

    def _column(self, form: NewForm, volume: Node) -> Node:
        """Return images of depth x all pixels."""
        _, channels, depth, *pixels = shape_of(volume)
        image = form.op(aten.reshape.default, volume, [-1, channels, depth, prod(pixels)])
        before, behind = self.pads[0]
        return image if before == behind else form.op(aten.constant_pad_nd.default, image, [0, 0, before, behind])

    def _slices(self, form: NewForm, volume: Node, count: int) -> Node:
        """Return `count` images for each volume: what one slice of the output reads, in its channels."""
        uneven = [(0, 0) if before == behind else (before, behind) for before, behind in self.pads[1:]]
        if any(map(any, uneven)):
            volume = form.op(aten.constant_pad_nd.default, volume, [*uneven[1], *uneven[0], 0, 0])
        _, channels, _, *pixels = shape_of(volume)
        value = form.op(aten.permute.default, volume, SWAP)
        kernel, step, dilation = self.kernel[0], self.stride[0], self.dilation[0]
        if kernel > 1 or step > 1 or any(self.pads[0]):
            each = channels // self.groups * prod(pixels)
            value = form.op(aten.reshape.default, value, [-1, shape_of(value)[1], self.groups, each])
            if any(self.pads[0]):
                value = form.op(aten.constant_pad_nd.default, value, [0, 0, 0, 0, *self.pads[0]])
            ends = [(1, first, first + step * (count - 1) + 1, step) for first in range(0, kernel * dilation, dilation)]
            parts = [form.op(aten.slice.Tensor, value, *end) for end in ends]
            value = parts[0] if kernel == 1 else form.op(aten.cat.default, parts, 3)
        return form.op(aten.reshape.default, value, [-1, kernel * channels, *pixels])


def _max_pool(form: NewForm) -> bool:
    given = arguments(form.node)
    kernel, padding, dilation = (integers(given[name], 3) for name in ("kernel_size", "padding", "dilation"))
    stride = integers(given["stride"], 3) if given["stride"] else kernel
    depth, (_, channels, count, *pixels) = shape_of(given["self"])[2], shape_of(form.node)
    # One axis at a time picks the same values: a maximum of maxima, and what is padded is never picked.
    window = (kernel[1:], stride[1:], padding[1:], dilation[1:], given["ceil_mode"])
    value = form.op(aten.max_pool2d.default, apart(form.op, given["self"]), *window)
    if kernel[0] > 1 or stride[0] > 1:
        # Memory stays as it is: channels and pixels of a slice are the channels of an image of one column.
        column = form.op(aten.reshape.default, value, [-1, depth, 1, channels * prod(pixels)])
        column = form.op(aten.permute.default, column, [0, 3, 1, 2])
        window = ([kernel[0], 1], [stride[0], 1], [padding[0], 0], [dilation[0], 1], given["ceil_mode"])
        column = form.op(aten.max_pool2d.default, column, *window)
        column = form.op(aten.permute.default, column, [0, 2, 3, 1])
        value = form.op(aten.reshape.default, column, [-1, channels, *pixels])
    form.replace(form.node, together(form.op, value, count))
    return True


def _average_pool(form: NewForm) -> bool:
    given = arguments(form.node)
    kernel, padding = integers(given["kernel_size"], 3), integers(given["padding"], 3)
    stride = integers(given["stride"], 3) if given["stride"] else kernel
    # Along depth as well it would be rounded twice.
    if (kernel[0], stride[0], padding[0]) != (1, 1, 0):
        return False
    rest = (given["ceil_mode"], given["count_include_pad"], given["divisor_override"])
    window = (kernel[1:], stride[1:], padding[1:], *rest)
    pooled = form.op(aten.avg_pool2d.default, apart(form.op, given["self"]), *window)
    form.replace(form.node, together(form.op, pooled, shape_of(form.node)[2]))
    return True


def _whole_mean(form: NewForm) -> bool:
    given = arguments(form.node)
    axes = given.get("dim", [2, 3, 4])
    if any(size != 1 for size in shape_of(form.node)[2:]) or given.get("dtype") is not None:
        return False
    if not isinstance(axes, list | tuple) or {axis % 5 for axis in axes} != {2, 3, 4}:
        return False
    _, channels, depth, height, width = shape_of(form.node.args[0])
    image = form.op(aten.reshape.default, form.node.args[0], [-1, channels, depth * height, width])
    mean = form.op(aten.mean.dim, image, [2, 3])
    form.replace(form.node, form.op(aten.reshape.default, mean, [-1, *shape_of(form.node)[1:]]))
    return True


def _adaptive_mean(form: NewForm) -> bool:
    given = arguments(form.node)
    before, after = shape_of(given["self"])[2:], shape_of(form.node)[1:]
    if set(after[1:]) == {1}:
        return _whole_mean(form)
    channels, depth, *pixels = after
    # Windows are boxes: the mean of a box is the mean of its slices' means.
    images = form.op(aten.adaptive_avg_pool2d.default, apart(form.op, given["self"]), pixels)
    if depth != before[0]:
        column = form.op(aten.reshape.default, images, [-1, before[0], channels * prod(pixels)])
        ends = [(k * before[0] // depth, -(-(k + 1) * before[0] // depth)) for k in range(depth)]
        parts = [form.op(aten.mean.dim, form.op(aten.slice.Tensor, column, 1, *end), [1], True) for end in ends]
        images = form.op(aten.reshape.default, form.op(aten.cat.default, parts, 1), [-1, channels, *pixels])
    form.replace(form.node, together(form.op, images, depth))
    return True


def _nearest(form: NewForm) -> bool:
    given = arguments(form.node)
    before, after = shape_of(given["input"])[2:], shape_of(form.node)[2:]
    size, scales = given["output_size"], given["scale_factors"]
    repeats = after[0] // before[0]
    # A factor of 2.1 may also give twice the slices, but not each of them twice.
    if after[0] != repeats * before[0] or (scales is not None and scales[0] != repeats):
        return False
    across = (None if size is None else list(after[1:]), None if scales is None else scales[1:])
    images = form.op(aten.upsample_nearest2d.vec, apart(form.op, given["input"]), *across)
    channels = shape_of(images)[1]
    if repeats > 1:
        each = form.op(aten.reshape.default, images, [-1, 1, channels * prod(after[1:])])
        each = form.op(aten.cat.default, [each] * repeats, 1)
        images = form.op(aten.reshape.default, each, [-1, channels, *after[1:]])
    form.replace(form.node, together(form.op, images, after[0]))
    return True


POOLS: dict[object, Callable[[NewForm], bool]] = {
    aten.max_pool3d.default: _max_pool,
    aten.avg_pool3d.default: _average_pool,
    aten.adaptive_avg_pool3d.default: _adaptive_mean,
    aten.mean.dim: _whole_mean,
    aten.upsample_nearest3d.vec: _nearest,
}
"""3-d pool or interpolation -> what replaces it by 2-d ones and returns whether it could."""
