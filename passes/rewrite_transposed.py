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

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from fxquant.core.ir import (
    Program,
    ScaleRule,
    arguments,
    erase_dead,
    free_path,
    is_constant,
    rule_of,
    set_parameter,
    shape_of,
    tensor_at,
    trace,
)
from fxquant.passes.base import Pass

aten = torch.ops.aten

PLAIN: dict[object, Callable[..., Any]] = {
    aten.conv_transpose1d.default: aten.conv1d.default,
    aten.conv_transpose2d.input: aten.conv2d.default,
}
"""Transposed convolution -> the ordinary one with as many axes."""
NORM = aten._native_batch_norm_legit_no_training.default
STATISTICS = range(1, 5)
"""Argument positions of what a batch norm knows of each channel."""


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
        layers = [_Layer(module, node) for node in module.graph.nodes if node.target in PLAIN and _has_form(node)]
        made: dict[tuple[object, ...], str] = {}
        for layer in layers:
            layer.rewrite(made, {other.node for other in layers if other.form == layer.form})
        erase_dead(module)
        return program, len(layers)


def _has_form(node: Node) -> bool:
    given = arguments(node)
    axes, shape = len(shape_of(given["weight"])) - 2, shape_of(given["input"])
    if not is_constant(given["weight"]) or not (given["bias"] is None or is_constant(given["bias"])):
        return False
    # A shuffle by unequal strides is a reshape to sizes that have to be known.
    strides = _sizes(given["stride"], axes)
    known = all(isinstance(size, int) for size in given["input"].meta["val"].shape[2:])
    shuffled = set(strides) == {1} or (axes == 2 and len(set(strides)) == 1)
    one_of_both = all(1 in pair for pair in zip(strides, _sizes(given["dilation"], axes), strict=True))
    return len(shape) == axes + 2 and one_of_both and (known or shuffled)


def _sizes(value: Any, axes: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [int(v) for v in (values * axes if len(values) == 1 else values)]


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
        sides = (_sizes(given[name], len(kernel)) for name in names)
        self.axes = [_Axis(*numbers) for numbers in zip(kernel, *sides, strict=True)]
        self.strides = [axis.stride for axis in self.axes]
        self.groups, self.phases = int(given["groups"]), prod(self.strides)
        #: layers of one form that share a weight share its new form
        self.form = (*self.strides, self.groups)

    def rewrite(self, made: dict[tuple[object, ...], str], leaving: set[Node]) -> None:
        """Replace the convolution and what moves in front of the shuffle.

        Args:
            made: (path, form) -> path of the parameter's new form; added to.
            leaving: convolutions of this form, which will not read their parameters any more.
        """
        # Read now: the layer in front may have been rewritten.
        given, ones = arguments(self.node), [1] * len(self.axes)
        zeros, dilation = [axis.zeros for axis in self.axes], [axis.dilation for axis in self.axes]
        operands = (given["input"], given["weight"], given["bias"], ones, zeros, dilation, self.groups)
        conv = self._insert(self.node, PLAIN[self.node.target], operands)
        self._change(conv, 1, self._ordinary, made, leaving)
        self._change(conv, 2, self._each, made, leaving)
        value, last = self._moved(trace(conv), made)
        for target, rest in chain(self._shuffle(value), self._cuts()):
            value = trace(self._insert(self.node, target, (value, *rest)))
        last.replace_all_uses_with(value)
        while last is not self.node:
            source = last.args[0]
            assert isinstance(source, Node)
            self.module.graph.erase_node(last)
            last = source
        self.module.graph.erase_node(last)

    def _insert(self, like: Node, target: Callable[..., Any], operands: Sequence[Any]) -> Node:
        with self.module.graph.inserting_before(self.node):
            made = self.module.graph.call_function(target, tuple(operands))
        made.meta = {key: value for key, value in like.meta.items() if key != "val"}
        return made

    def _change(
        self,
        reader: Node,
        position: int,
        change: Callable[[Tensor], Tensor],
        made: dict[tuple[object, ...], str],
        leaving: set[Node],
    ) -> None:
        """Let a node read a parameter's new form: in the parameter's place, or beside it where others read that."""
        source = reader.args[position]
        if not isinstance(source, Node):
            return
        path, key = str(source.target), (source.target, self.form)
        tensor = tensor_at(self.module, path)
        known, trainable = made.get(key), tensor.requires_grad
        if known is None:
            same = [n for n in self.module.graph.nodes if n.op == "get_attr" and n.target == path]
            alone = {user for n in same for user in n.users} <= {reader, *leaving}
            made[key] = path if alone else free_path(self.module, f"{path}_phases")
        value = change(tensor.detach()) if known is None else tensor_at(self.module, known).detach()
        set_parameter(self.module, reader, position, made[key], value, trainable)

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

    def _moved(self, conv: Node, made: dict[tuple[object, ...], str]) -> tuple[Node, Node]:
        """Repeat behind `conv` what alone follows and treats pixels alike; return its value and what it stands for."""
        value, last = conv, self.node
        while len(last.users) == 1:
            (user,) = last.users
            rule = rule_of(user)
            ends = list(user.users)
            if user.target is NORM and len(ends) == 1 and ends[0].args[1:] == (0,):
                if not all(part is None or is_constant(part) for part in user.args[1:5]):
                    break
                norm = self._insert(user, NORM, (value, *user.args[1:]))
                for position in STATISTICS:
                    self._change(norm, position, self._each, made, {user})
                value, last = trace(self._insert(ends[0], operator.getitem, (trace(norm), 0))), ends[0]
            elif rule is not None and rule.scale is ScaleRule.ABSORB and user.all_input_nodes == [last]:
                assert callable(user.target)
                value, last = trace(self._insert(user, user.target, (value, *user.args[1:]))), user
            else:
                break
        return value, last

    def _shuffle(self, value: Node) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
        """Return the ops that put the phases in their places, with what they are given beside the value."""
        if self.phases == 1:
            return []
        if self.strides == 2 * self.strides[:1]:
            return [(aten.pixel_shuffle.default, (self.strides[0],))]
        channels, count, sizes = shape_of(value)[1] // self.phases, len(self.strides), shape_of(value)[2:]
        axes = [axis for k in range(count) for axis in (2 + count + k, 2 + k)]
        return [
            (aten.reshape.default, ([-1, channels, *self.strides, *sizes],)),
            (aten.permute.default, ([0, 1, *axes],)),
            (aten.reshape.default, ([-1, channels, *(n * s for n, s in zip(sizes, self.strides, strict=True))],)),
        ]

    def _cuts(self) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
        cuts = [(dim, *axis.cut) for dim, axis in enumerate(self.axes, 2)]
        ends = [(dim, front, -behind if behind else 2**63 - 1) for dim, front, behind in cuts if front or behind]
        return [(aten.slice.Tensor, end) for end in ends]
