"""Rewrite transposed convolutions as ordinary ones, for which every runtime has integer kernels.

With stride s, kernel k and padding p, output pixel t reads input pixel j through tap t + p - s j. Written as
t + p = s q + r with phase r in 0..s-1,

    y[s q + r - p] = sum_n W[s n + r] x[q - n],    n = 0..ceil(k / s) - 1,

so all phases are output channels of one convolution of stride 1 whose kernel is ceil(k / s), zeros where s does not
divide k; a pixel shuffle puts them in their places, and a slice takes off p pixels in front and what is over behind
(Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016). Exact for every padding, output
padding and number of groups; with stride 1 nothing is shuffled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from fxquant.core.ir import Program, arguments, erase_dead, is_constant, shape_of, trace
from fxquant.passes.base import Pass
from fxquant.passes.new_form import SWAP, Made, NewForm, integers, pays_as_planes, rewrite_all

aten = torch.ops.aten

PLAIN: dict[object, Callable[..., Any]] = {
    aten.conv_transpose1d.default: aten.conv1d.default,
    aten.conv_transpose2d.input: aten.conv2d.default,
    aten.conv_transpose3d.input: aten.conv3d.default,
}
"""Transposed convolution -> the ordinary one with as many axes."""


@dataclass(frozen=True)
class _Axis:
    """One spatial axis of a transposed convolution.

    Args:
        kernel: taps, at least 1.
        stride: at least 1.
        padding: pixels that are cut off on either side.
        extra: output padding, pixels that are added behind.
        dilation: distance of two taps; above 1 only with stride 1.
    """

    kernel: int
    stride: int
    padding: int
    extra: int
    dilation: int

    @property
    def taps(self) -> int:
        """Kernel of the ordinary convolution."""
        return -(-self.kernel // self.stride)

    @property
    def reach(self) -> int:
        """Pixels between its first and its last tap."""
        return self.dilation * (self.taps - 1)

    @property
    def zeros(self) -> int:
        """Zeros on either side of the ordinary convolution's input, enough for the first and the last pixel."""
        behind = (self.dilation * (self.kernel - 1) - self.padding + self.extra) // self.stride
        return max(0, self.reach - self.padding // self.stride, behind)

    @property
    def cut(self) -> tuple[int, int]:
        """Pixels of the shuffled result that are too many in front and behind."""
        front = self.padding - self.stride * (self.reach - self.zeros)
        # Both lengths grow by the stride with every input pixel, so what is over does not depend on the size.
        whole = self.stride * (2 * self.zeros - self.reach + 1)
        wanted = self.dilation * (self.kernel - 1) + 1 - 2 * self.padding + self.extra
        return front, whole - front - wanted


@dataclass(frozen=True)
class RewriteTransposed(Pass):
    """Rewrite every transposed convolution whose weight is a parameter, and that has either stride or dilation, as an
    ordinary one.

    The batch norm and the clip behind it move in front of the shuffle, so that they are folded and absorbed as behind
    any convolution.
    """

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program without transposed convolutions."""
        module = program.module
        layers = (_Layer(module, node) for node in module.graph.nodes if node.target in PLAIN and _has_form(node))
        changed = rewrite_all(layers)
        erase_dead(module)
        return program, changed


def _has_form(node: Node) -> bool:
    given = arguments(node)
    axes, shape = len(shape_of(given["weight"])) - 2, shape_of(given["input"])
    if not is_constant(given["weight"]) or not (given["bias"] is None or is_constant(given["bias"])):
        return False
    # A shuffle by unequal strides is a reshape to sizes that have to be known.
    strides = integers(given["stride"], axes)
    known = all(isinstance(size, int) for size in given["input"].meta["val"].shape[2:])
    shuffled = set(strides) == {1} or (axes == 2 and len(set(strides)) == 1)
    one_of_both = all(1 in pair for pair in zip(strides, integers(given["dilation"], axes), strict=True))
    if axes == 3 and not (known and pays_as_planes(shape_of(given["weight"])[0], int(given["groups"]))):
        return False
    return len(shape) == axes + 2 and one_of_both and (known or shuffled)


class _Layer:
    """A transposed convolution of a graph.

    Args:
        module: a fork that holds it.
        node: the convolution.
    """

    def __init__(self, module: GraphModule, node: Node) -> None:
        self.module, self.node, given = module, node, arguments(node)
        kernel = shape_of(given["weight"])[2:]
        names = ("stride", "padding", "output_padding", "dilation")
        sides = (integers(given[name], len(kernel)) for name in names)
        self.axes = [_Axis(*numbers) for numbers in zip(kernel, *sides, strict=True)]
        self.strides = [axis.stride for axis in self.axes]
        self.groups, self.phases = int(given["groups"]), prod(self.strides)
        self.form: tuple[object, ...] = ("phases", *self.strides, self.groups)

    def rewrite(self, made: Made, leaving: set[Node]) -> None:
        """Replace the convolution and what moves in front of the shuffle.

        Args:
            made: parameters that have their new form already; added to.
            leaving: convolutions of this form, which will not read their parameters any more.
        """
        # Read now: the layer in front may have been rewritten.
        given, ones = arguments(self.node), [1] * len(self.axes)
        form = NewForm(self.module, self.node, self.form, made, leaving)
        zeros, dilation = [axis.zeros for axis in self.axes], [axis.dilation for axis in self.axes]
        operands = (given["input"], given["weight"], given["bias"], ones, zeros, dilation, self.groups)
        conv = form.insert(self.node, PLAIN[self.node.target], operands)
        form.change(conv, 1, self._ordinary)
        form.change(conv, 2, self._each)
        value, last = form.moved(trace(conv), self._each)
        for target, rest in chain(self._shuffle(value), self._cuts()):
            value = form.op(target, value, *rest)
        form.replace(last, value)

    def _each(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.phases)

    def _ordinary(self, weight: Tensor) -> Tensor:
        """Return the ordinary convolution's weight: output channels in the order (channel, phase)."""
        inputs, outputs = weight.shape[0] // self.groups, weight.shape[1]
        missing = [(0, axis.taps * axis.stride - axis.kernel) for axis in reversed(self.axes)]
        pairs = chain(*((axis.taps, axis.stride) for axis in self.axes))
        split = functional.pad(weight, list(chain(*missing))).reshape(self.groups, inputs, outputs, *pairs)
        taps = [3 + 2 * k for k in range(len(self.axes))]
        ordered = split.permute(0, 2, *(tap + 1 for tap in taps), 1, *taps)
        rows = ordered.reshape(-1, inputs, *(axis.taps for axis in self.axes))
        # A convolution reads its window forwards, a transposed one writes it backwards.
        return rows.flip(tuple(range(2, rows.dim()))).contiguous()

    def _shuffle(self, value: Node) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
        """Return the ops that put the phases in their places, with what they are given beside the value."""
        if self.phases == 1:
            return []
        if self.strides == 2 * self.strides[:1]:
            return [(aten.pixel_shuffle.default, (self.strides[0],))]
        channels, count, sizes = shape_of(value)[1] // self.phases, len(self.strides), shape_of(value)[2:]
        if len(set(self.strides[1:])) == 1 and count == 3:
            return self._slices_shuffled(channels, *sizes)
        axes = [axis for k in range(count) for axis in (2 + count + k, 2 + k)]
        return [
            (aten.reshape.default, ([-1, channels, *self.strides, *sizes],)),
            (aten.permute.default, ([0, 1, *axes],)),
            (aten.reshape.default, ([-1, channels, *(n * s for n, s in zip(sizes, self.strides, strict=True))],)),
        ]

    def _slices_shuffled(
        self, channels: int, depth: int, *pixels: int
    ) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
        """Return the ops that shuffle the pixels of each slice, and put its phases along depth behind each other."""
        along, across = self.strides[:2]
        whole = [across * size for size in pixels]
        return [
            (aten.permute.default, (SWAP,)),
            (aten.reshape.default, ([-1, channels * self.phases, *pixels],)),
            *([(aten.pixel_shuffle.default, (across,))] if across > 1 else []),
            (aten.reshape.default, ([-1, depth, channels, along, prod(whole)],)),
            (aten.permute.default, ([0, 1, 3, 2, 4],)),
            (aten.reshape.default, ([-1, depth * along, channels, *whole],)),
            (aten.permute.default, (SWAP,)),
        ]

    def _cuts(self) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
        cuts = [(dim, *axis.cut) for dim, axis in enumerate(self.axes, 2)]
        ends = [(dim, front, -behind if behind else 2**63 - 1) for dim, front, behind in cuts if front or behind]
        return [(aten.slice.Tensor, end) for end in ends]
