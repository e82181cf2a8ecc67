"""Which integer module stands for which ATen op, and what an op must look like for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.backends.int8.affine import ByteGrid
from fxquant.backends.int8.conv import CALL, PASS_PER_ELEMENT, IntegerConv, traced_form
from fxquant.backends.int8.kernels import ConvGeometry, ConvGrids, LinearEnd
from fxquant.backends.int8.linear import IntegerLinear
from fxquant.backends.int8.modules import IntegerAdd, IntegerAveragePool, IntegerMaxPool, IntegerMul, IntegerPad
from fxquant.core.ir import FakeQuantize, constant, rule_of, shape_of

aten = torch.ops.aten


def integer_weight(module: GraphModule, node: Node) -> tuple[Tensor, Tensor] | str:
    """Return int8 weight and float32 scale per output channel of a weighted op, or why there are none.

    The integers are `round(fake_quant(w) / scale)`, so they are exactly those of the simulation, whatever rounding
    the fake-quant module learned.
    """
    rule = rule_of(node)
    assert rule is not None
    assert rule.weight is not None
    source = node.args[rule.weight]
    if not isinstance(source, Node) or source.op == "get_attr":
        return "its weight carries no quantizer: the plan leaves it in float"
    fake = module.get_submodule(str(source.target)) if source.op == "call_module" else None
    if not isinstance(fake, FakeQuantize):
        return "its weight is computed by the graph, not a parameter"
    weight = constant(module, source.args[0])
    if weight is None:
        return "its weight is computed by the graph, not a parameter"
    if bool(fake.zero_point.any()) or not fake.spec.signed or fake.spec.channel_axis not in (None, 0):
        return "integer kernels take weights on signed grids around zero with one scale per output channel"
    channels = weight.shape[0]
    scales = fake.scale.detach().float().expand(channels).clone()
    with torch.no_grad():
        real = fake(weight)
    return torch.round(real / scales.view(-1, *[1] * (weight.dim() - 1))).to(torch.int8), scales


@dataclass(frozen=True)
class Ending:
    """What an integer op writes, and what it does before it rounds.

    Args:
        out: grid of the output, None for float32.
        addend: grid of a second operand that is added, None for none.
        activation: name of a `LinearEnd`.
    """

    out: ByteGrid | None = None
    addend: ByteGrid | None = None
    activation: str = "none"


Maker = Callable[[Ending], nn.Module]
"""Makes an op's integer module for what is behind it."""

SUMS = frozenset({"conv"})
"""Kinds of ops whose kernel adds a second operand before it rounds."""

ACTIVATED = frozenset({"linear"})
"""Kinds of ops whose kernel computes the activations of `activation_name`."""


def activation_name(node: Node) -> str | None:
    """Return what a linear kernel calls the activation that a node computes, None if it has none."""
    if node.target is not aten.gelu.default:
        return None
    way = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(way))


def weighted_maker(module: GraphModule, node: Node, grid: ByteGrid, exact: bool, batch: int) -> Maker | str:
    """Return what makes the integer convolution or linear layer of a node, or why there is none.

    Args:
        module: the simulated graph that holds the node's weights.
        node: the convolution or linear layer.
        grid: of its input.
        exact: take the float64 route whatever the CPU can do.
        batch: images per call that kernels are chosen for.
    """
    found = integer_weight(module, node)
    if isinstance(found, str):
        return found
    weight, scales = found
    rule = rule_of(node)
    assert rule is not None
    source = node.args[rule.bias] if rule.bias is not None and len(node.args) > rule.bias else None
    given = constant(module, source)
    if source is not None and given is None:
        return "its bias is computed by the graph, not a parameter"
    bias = None if given is None else given.float()
    if rule.kind == "linear":
        packed = _prefers_packed(node, weight, batch)
        return lambda end: IntegerLinear(
            weight, scales, bias, grid, LinearEnd(end.out, end.activation), packed or end.activation != "none", exact
        )
    geometry, before = _geometry(node, weight)
    images = weight.unsqueeze(2) if weight.dim() == 3 else weight
    form = traced_form(images, geometry, batch * prod(shape_of(node)[1:]))
    shape = _image_shape(node, before, batch)
    return lambda end: IntegerConv(
        weight, scales, bias, geometry, ConvGrids(grid, end.out, end.addend), before, form, shape, exact
    )


def _image_shape(node: Node, before: tuple[int, int, int, int], batch: int) -> tuple[int, ...] | None:
    """Return `(N, C, H, W)` of a convolution's padded input, None where the graph leaves its size open."""
    source = node.args[0]
    while isinstance(source, Node) and not shape_of(source) and source.args:
        source = source.args[0]
    known = shape_of(source)
    if len(known) < 3:
        return None
    channels, height, width = known[1], *(1, *known[2:])[-2:]
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    return batch, channels, height + before[2] + before[3], width + before[0] + before[1]


def _prefers_packed(node: Node, weight: Tensor, batch: int) -> bool:
    """Whether saving the passes over the sums outweighs the cost of the call."""
    shape = shape_of(node.args[0])
    rows = batch * prod(shape[1:-1])
    return rows * weight.shape[0] * PASS_PER_ELEMENT > CALL


def _geometry(node: Node, weight: Tensor) -> tuple[ConvGeometry, tuple[int, int, int, int]]:
    given = [*node.args[3:7], *([1], [0], [1], 1)[len(node.args[3:7]) :]]
    kernel = tuple(weight.shape[2:])
    stride, dilation = _pair(given[0], 1), _pair(given[2], 1)
    groups = given[3]
    assert isinstance(groups, int)
    if not isinstance(given[1], str):
        return ConvGeometry(stride, _pair(given[1], 0), dilation, groups), (0, 0, 0, 0)
    if given[1] == "valid":
        return ConvGeometry(stride, (0, 0), dilation, groups), (0, 0, 0, 0)
    # "same" puts the odd zero at the end, which no kernel pads by itself.
    height, width = ((k - 1) * d for k, d in zip((1, *kernel)[-2:], dilation, strict=True))
    before = (width // 2, width - width // 2, height // 2, height - height // 2)
    return ConvGeometry(stride, (0, 0), dilation, groups), before


def _pair(value: object, fill: int) -> tuple[int, int]:
    """Return (height, width) of an ATen size argument; one axis is the width."""
    sizes = [int(str(v)) for v in (value if isinstance(value, Sequence) else [value])]
    if len(sizes) == 1:
        # A conv2d may be given one number for both axes; a conv1d weight always gives a list of one.
        sizes = [sizes[0], sizes[0]] if not isinstance(value, Sequence) else [fill, sizes[0]]
    return sizes[0], sizes[1]


def _add(node: Node, grids: Sequence[ByteGrid], out: ByteGrid, exact: bool) -> nn.Module:
    del node
    return IntegerAdd(grids[0], grids[-1], out, exact)


def _mul(node: Node, grids: Sequence[ByteGrid], out: ByteGrid, exact: bool) -> nn.Module:
    del node, exact
    return IntegerMul(grids[0], grids[-1], out)


def _pool(node: Node, grids: Sequence[ByteGrid], out: ByteGrid, exact: bool) -> nn.Module:
    del exact
    return IntegerAveragePool(grids[0], out, tuple(node.args[1:]))


def _global_pool(node: Node, grids: Sequence[ByteGrid], out: ByteGrid, exact: bool) -> nn.Module:
    del exact
    keep = node.target is not aten.mean.dim or (len(node.args) > 2 and bool(node.args[2]))
    return IntegerAveragePool(grids[0], out, None, keep)


COMPUTED: dict[object, Callable[[Node, Sequence[ByteGrid], ByteGrid, bool], nn.Module]] = {
    aten.add.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.avg_pool1d.default: _pool,
    aten.avg_pool2d.default: _pool,
    aten.adaptive_avg_pool2d.default: _global_pool,
    aten.mean.dim: _global_pool,
}
"""Op without weights -> maker of the module that computes it from uint8 to uint8."""


def pad_module(node: Node, grid: ByteGrid) -> nn.Module | None:
    """Return padding of images for a constant-pad node, None for other ranks, other axes and cropping."""
    widths = [width for width in _sequence(node.args[1]) if isinstance(width, int)]
    pads = tuple([*widths, 0, 0][:4])
    fits = len(shape_of(node)) == 4 and len(widths) in (2, 4) and min(pads) >= 0
    return IntegerPad(pads, grid.zero_point) if fits else None


def _sequence(value: object) -> Sequence[object]:
    return value if isinstance(value, Sequence) else [value]


def max_pool_module(node: Node) -> nn.Module | None:
    """Return max pooling on uint8 for a max_pool1d or max_pool2d node, None for dilation and ceil mode."""
    axes = 1 if node.target is aten.max_pool1d.default else 2
    given = [*node.args[1:6], *([], [], [0], [1], False)[len(node.args) - 1 :]]
    kernel, padding, dilation = (_sizes(given[i], axes) for i in (0, 2, 3))
    stride = _sizes(given[1], axes) if given[1] else kernel
    if given[4] or set(dilation) != {1}:
        return None
    return IntegerMaxPool(kernel, stride, padding)


def _sizes(value: object, axes: int) -> tuple[int, ...]:
    sizes = [int(v) for v in value] if isinstance(value, Sequence) else [int(str(value))]
    return tuple(sizes * axes if len(sizes) == 1 else sizes)
