"""The lowering table of fx_int8: which integer module computes each kind of op, and in which forms of the op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.backends.affine import ByteGrid
from fxquant.backends.exact import JoinFormula, LayerFormula, Requantization, image_mean, pairwise, window_mean
from fxquant.backends.int8 import torch_formulas as formulas
from fxquant.backends.int8.conv import CALL, PASS_PER_ELEMENT, IntegerConv, traced_form
from fxquant.backends.int8.geometry import ConvGeometry, ConvGrids
from fxquant.backends.int8.kernels import LinearEnd
from fxquant.backends.int8.linear import IntegerLinear
from fxquant.backends.int8.modules import IntegerAdd, IntegerAveragePool, IntegerMaxPool, IntegerMul, IntegerPad
from fxquant.backends.int8.scale_order import conv_joins_scales
from fxquant.backends.kernel_rows import KernelRow, formulas_of
from fxquant.core.ir import OPS, FakeQuantize, arguments, constant, rule_of, shape_of

aten = torch.ops.aten


def scales_joined(node: Node, weight: Tensor) -> Callable[[tuple[int, ...]], bool]:
    """Return a function of the input's shape: whether a convolution's kernel multiplies its two scales first."""
    geometry, (left, right, top, bottom) = conv_geometry(node, weight)
    out, each, *kernel = weight.shape

    def joined(shape: tuple[int, ...]) -> bool:
        # One axis counts as the width, as in `IntegerConv`.
        count, channels, *sizes = shape
        height, width = sizes if len(sizes) == 2 else (1, *sizes)
        padded = (count, channels, height + top + bottom, width + left + right)
        return conv_joins_scales(padded, (out, each, *(kernel if len(kernel) == 2 else (1, *kernel))), geometry)

    return joined


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
    # Kernels sum x * w without correcting for the weight's zero-point, and rescale once per output channel.
    if bool(fake.zero_point.any()) or not fake.spec.signed or fake.spec.channel_axis not in (None, 0):
        return "integer kernels take weights on signed grids around zero with one scale per output channel"
    return integers_of(fake, weight)


def integers_of(fake: FakeQuantize, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 integers and float32 scales of a weight whose first axis counts channels, as simulated."""
    scales = fake.scale.detach().float().expand(weight.shape[0]).clone()
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

    @property
    def grid(self) -> ByteGrid:
        """Grid of the output of an op that writes integers."""
        assert self.out is not None
        return self.out


Maker = Callable[[Ending], nn.Module]
"""Makes an op's integer module for what is behind it."""


@dataclass(frozen=True)
class OpCall:
    """One op of a simulated graph whose inputs are integers.

    Args:
        module: the simulated graph, which holds the op's weights.
        node: the op.
        grids: of its activation inputs, in the order of its arguments.
        exact: take the float64 route whatever the CPU can do.
        batch: images per call that kernels are chosen for.
    """

    module: GraphModule
    node: Node
    grids: Sequence[ByteGrid]
    exact: bool = False
    batch: int = 1


@dataclass(frozen=True)
class IntegerOp(KernelRow):
    """A row of the lowering table.

    Args:
        make: returns what makes the integer module of one op, or why this op has none; None where `refuse` says why.
        activation: names the activation (of a `LinearEnd`) that a node computes, if the kernel computes it too.
        compiled_layer: `layer` as Inductor compiles the module; None where it rounds alike.
        compiled_join: `join` as Inductor compiles the module; None where it rounds alike.
    """

    make: Callable[[OpCall], Maker | str] | None = None
    activation: Callable[[Node], str | None] = lambda _: None
    compiled_layer: LayerFormula | None = None
    compiled_join: JoinFormula | None = None


def _gelu(node: Node) -> str | None:
    if node.target is not aten.gelu.default:
        return None
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(arguments(node)["approximate"])


def _parameters(call: OpCall) -> tuple[Tensor, Tensor, Tensor | None] | str:
    """Return int8 weight, float32 scale per output channel and float32 bias of a weighted op, or why there are none."""
    found = integer_weight(call.module, call.node)
    if isinstance(found, str):
        return found
    rule, args = OPS[call.node.target], call.node.args
    source = args[rule.bias] if rule.bias is not None and len(args) > rule.bias else None
    bias = constant(call.module, source)
    if source is not None and bias is None:
        return "its bias is computed by the graph, not a parameter"
    return *found, None if bias is None else bias.float()


def _linear(call: OpCall) -> Maker | str:
    found = _parameters(call)
    if isinstance(found, str):
        return found
    # Only the packed kernel computes an activation; without one the cheaper of the two runs.
    packed = _prefers_packed(call.node, found[0], call.batch)
    return lambda end: IntegerLinear(
        *found, call.grids[0], LinearEnd(end.out, end.activation), packed or end.activation != "none", call.exact
    )


def _conv(call: OpCall) -> Maker | str:
    found = _parameters(call)
    if isinstance(found, str):
        return found
    weight, node = found[0], call.node
    geometry, before = conv_geometry(node, weight)
    # Kernels know two axes: a 1-d convolution is one over images of height 1.
    images = weight.unsqueeze(2) if weight.dim() == 3 else weight
    form = traced_form(images, geometry, call.batch * prod(shape_of(node)[1:]))
    shape = _image_shape(node, before, call.batch)
    return lambda end: IntegerConv(
        *found, geometry, ConvGrids(call.grids[0], end.out, end.addend), before, form, shape, call.exact
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


def conv_geometry(node: Node, weight: Tensor) -> tuple[ConvGeometry, tuple[int, int, int, int]]:
    """Return a convolution node's geometry, and the zeros to add at left, right, top, bottom before it."""
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


def _add(call: OpCall) -> Maker:
    return lambda end: IntegerAdd(call.grids[0], call.grids[-1], end.grid, call.exact)


def _mul(call: OpCall) -> Maker:
    return lambda end: IntegerMul(call.grids[0], call.grids[-1], end.grid)


def _pool(call: OpCall) -> Maker:
    return lambda end: IntegerAveragePool(call.grids[0], end.grid, tuple(call.node.args[1:]))


def _global_pool(call: OpCall) -> Maker:
    # Adaptive pooling has no such argument, and keeps its axes.
    keep = bool(arguments(call.node).get("keepdim", True))
    return lambda end: IntegerAveragePool(call.grids[0], end.grid, None, keep)


def _pad(call: OpCall) -> Maker | str:
    widths = _sequence(call.node.args[1])
    if not all(isinstance(width, int) for width in widths):
        return "its widths are computed by the graph"
    # Padding of an image's width is padding of both its axes, one of them by nothing.
    pads = [int(str(width)) for width in widths] + [0, 0] * (len(shape_of(call.node)) == 4 and len(widths) == 2)
    return lambda end: IntegerPad(tuple(pads), end.grid.zero_point)


def _max_pool(call: OpCall) -> Maker | str:
    given = arguments(call.node)
    axes = 1 if call.node.target is aten.max_pool1d.default else 2
    kernel, padding, dilation = (_sizes(given[name], axes) for name in ("kernel_size", "padding", "dilation"))
    stride = _sizes(given["stride"], axes) if given["stride"] else kernel
    if given["ceil_mode"] or set(dilation) != {1}:
        return "max pooling in ceil mode or with dilation has no integer kernel"
    made = IntegerMaxPool(kernel, stride, padding)
    return lambda _: made


def _sequence(value: object) -> Sequence[object]:
    return value if isinstance(value, Sequence) else [value]


def _sizes(value: object, axes: int) -> tuple[int, ...]:
    sizes = [int(str(v)) for v in _sequence(value)]
    return tuple(sizes * axes if len(sizes) == 1 else sizes)


INTEGER_OPS: dict[str, IntegerOp] = {
    "conv": IntegerOp(
        "onednn.qconv2d_pointwise", writes_integers=True, adds_operand=True, make=_conv, layer=formulas.onednn_conv
    ),
    "linear": IntegerOp(
        "aten._int_mm",
        make=_linear,
        activation=_gelu,
        layer=formulas.torch_linear,
        compiled_layer=formulas.inductor_layer,
    ),
    "add": IntegerOp(
        "aten.add", make=_add, join=pairwise(formulas.torch_add), compiled_join=pairwise(formulas.inductor_add)
    ),
    "mul": IntegerOp(
        "aten.mul",
        make=_mul,
        join=pairwise(partial(formulas.multiply, formulas.eager)),
        compiled_join=pairwise(partial(formulas.multiply, formulas.inductor)),
    ),
    "avg_pool": IntegerOp(
        "aten.avg_pool2d",
        make=_pool,
        join=window_mean(partial(formulas.average, formulas.eager)),
        compiled_join=window_mean(partial(formulas.average, formulas.inductor)),
    ),
    "global_pool": IntegerOp(
        "aten.sum",
        make=_global_pool,
        join=image_mean(partial(formulas.mean, formulas.eager)),
        compiled_join=image_mean(partial(formulas.mean, formulas.inductor)),
    ),
    "max_pool": IntegerOp("aten.maximum", make=_max_pool),
    "pad": IntegerOp("fxquant.pad_u8", make=_pad),
    "matmul": IntegerOp(refuse="a product of two activations runs at float speed, and quantizing both costs extra"),
}
"""The lowering table: kind of op -> its integer module. What keeps the grid and has no row runs on uint8 as it is."""


def eager_formulas() -> Requantization:
    """Return how PyTorch's kernels round."""
    return replace(formulas_of(INTEGER_OPS, partial(formulas.quantize, formulas.eager)), joined=scales_joined)


def compiled_formulas(forms: Mapping[str, str]) -> Requantization:
    """Return how the same rounds as Inductor compiles it.

    Args:
        forms: name of a convolution -> the form in which it is traced, see `IntegerConv.traced_as`.
    """
    rows = {
        kind: replace(row, layer=row.compiled_layer or row.layer, join=row.compiled_join or row.join)
        for kind, row in INTEGER_OPS.items()
    }
    # Inductor fuses some convolutions with what is around them, and these round another way.
    named = {name: formulas.FORMS[form] for name, form in forms.items() if form in formulas.FORMS}
    return replace(formulas_of(rows, partial(formulas.quantize, formulas.inductor)), joined=scales_joined, named=named)
