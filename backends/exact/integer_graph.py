"""The exact reference: the explicit integer graph, accumulated without error and requantized as one runtime does it.

Two computations that round by different formulas differ at the first tie, and every integer that differs changes others
behind it; after 50 layers the two are as far apart as quantization noise. So the reference of a runtime uses the
runtime's formulas (`fxquant.backends.exact.requantize`), and exact arithmetic otherwise: then all integers are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.backends.affine import UINT8_MAX, ByteGrid
from fxquant.backends.exact.edge_trace import EXACT
from fxquant.backends.exact.requantize import LayerFormula, Requantization, Sums
from fxquant.backends.explicit_graph import to_qdq
from fxquant.backends.qdq_ops import dequantize, dequantize_channels, quantize
from fxquant.core.ir import ScaleRule, clip_bounds, constant, erase_dead, finish, rule_of

WHOLE = 2.0**24
"""float32 holds every integer up to here, and so every sum that stays below, in whatever order it is formed."""

Weighted = Callable[[Tensor, Tensor], Tensor]
"""A convolution or linear layer without bias, of float tensors."""


class ExactQuantize(nn.Module):
    """float32 in, uint8 out."""

    def __init__(self, rule: Requantization, grid: ByteGrid) -> None:
        super().__init__()
        self.rule, self.grid = rule, grid

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid."""
        return _clamped(self.rule.quantize(x, self.grid), self.grid)


class ExactLayer(nn.Module):
    """A convolution or linear layer: uint8 in, uint8 out, or float32 where there is no output grid.

    Args:
        formula: how its sums are requantized.
        op: the layer without bias.
        weight: int8, output channels first.
        scales: float32 `(channels,)`.
        bias: int32 `(channels,)`, or None.
        grid: of the input.
        out: of the output, None for float32.
        joined: shape of the input -> `Sums.joined`; None where it is never so.
    """

    def __init__(
        self,
        formula: LayerFormula,
        op: Weighted,
        weight: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        grid: ByteGrid,
        out: ByteGrid | None,
        joined: Callable[[tuple[int, ...]], bool] | None = None,
    ) -> None:
        super().__init__()
        self.formula, self.op, self.grid, self.out, self.joined = formula, op, grid, out, joined
        #: grid of a second operand that is added, None for none
        self.addend: ByteGrid | None = None
        rows = weight.flatten(1).double()
        largest = rows.abs().sum(dim=1) * UINT8_MAX + (0 if bias is None else bias.double().abs())
        # Most layers stay below; others take float64, exact up to 2^53 and slower.
        kind = torch.float64 if float(largest.max()) >= WHOLE else torch.float32
        # Channels come last in the product with a matrix, and before the spatial axes of a filter elsewhere.
        channels = (-1, *[1] * (weight.dim() - 2))
        self.weight, self.scales = weight.to(kind), scales.float().view(channels)
        self.bias = None if bias is None else bias.to(kind).view(channels)
        self.shift = (grid.zero_point * rows.sum(dim=1)).to(kind).view(channels)

    def forward(self, q: Tensor, addend: Tensor | None = None) -> Tensor:
        """Return the layer's answer, the addend added before it is rounded."""
        sums = self.op(q.to(self.weight.dtype) - self.grid.zero_point, self.weight)
        joined = self.joined is not None and self.joined(tuple(q.shape))
        found = Sums(sums, self.grid.scale, self.scales, self.bias, self.shift, joined)
        levels = self.formula(found, addend, self.addend, self.out)
        return levels if self.out is None else _clamped(levels, self.out)


class ExactJoin(nn.Module):
    """A sum, product or mean of uint8 tensors, each on its own grid.

    Args:
        levels: the runtime's formula.
        out: grid of the result.
    """

    def __init__(self, levels: Callable[..., Tensor], out: ByteGrid) -> None:
        super().__init__()
        self.levels, self.out = levels, out

    def forward(self, *operands: Tensor) -> Tensor:
        """Return the result as uint8."""
        return _clamped(self.levels(*operands), self.out)


def _clamped(levels: Tensor, grid: ByteGrid) -> Tensor:
    return levels.clamp(grid.low, grid.high).to(torch.uint8)


def exact_graph(module: GraphModule, formulas: Requantization) -> GraphModule:
    """Return the graph whose integers are those that a runtime computes.

    Layers, sums, products and poolings between quantizers are computed on integers; what the plan or the op leaves in
    float is computed in float32, as accurately as PyTorch does, which no runtime repeats to the last bit. Nodes that
    make an edge's integers carry its name in `meta[EDGE]`.

    Args:
        module: simulated graph; it is not changed.
        formulas: how the runtime rounds.

    Raises:
        LoweringError: a quantizer's grid does not fit uint8.
    """
    exact = to_qdq(module)
    for node in list(exact.graph.nodes):
        if node.target is quantize:
            _replace_quantize(exact, node, formulas)
    for node in list(exact.graph.nodes):
        layer = _layer(exact, node, formulas, None)
        if layer is not None:
            made = _call(exact, node, layer, (_integers(node.args[0]),))
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
    erase_dead(exact)
    return finish(exact)


def _replace_quantize(exact: GraphModule, node: Node, rule: Requantization) -> None:
    source, scale, zero_point, qmin, qmax = node.args
    assert isinstance(source, Node)
    assert isinstance(qmin, int)
    assert isinstance(qmax, int)
    grid = ByteGrid(_number(exact, scale), int(_number(exact, zero_point)), qmin, qmax)
    base, clipped = _behind_clips(source, grid)
    made = None
    if base is not None:
        layer = _layer(exact, base, rule, clipped)
        fused = _fused_sum(exact, base, rule, clipped)
        join = _join(exact, base, rule, clipped) if layer is None else None
        if layer is not None:
            made = _call(exact, node, layer, (_integers(base.args[0]),))
        elif fused is not None:
            made = _call(exact, node, *fused)
        elif join is not None:
            made = _call(exact, node, join, tuple(_integers(source) for source in _operands(base)))
    if made is None:
        made = _call(exact, node, ExactQuantize(rule, grid), (source,))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    exact.graph.erase_node(node)


def _call(exact: GraphModule, node: Node, made: nn.Module, inputs: tuple[Node, ...]) -> Node:
    exact.add_submodule(f"exact.{node.name}", made)
    with exact.graph.inserting_before(node):
        return exact.graph.create_node("call_module", f"exact.{node.name}", inputs, name=f"{EXACT}{node.name}")


def _number(exact: GraphModule, node: object) -> float:
    value = constant(exact, node)
    assert value is not None
    return float(value)


def _integers(node: object) -> Node:
    """Return the node with the integers that a dequantize node reads."""
    assert isinstance(node, Node)
    assert isinstance(node.args[0], Node)
    return node.args[0]


def _grid(exact: GraphModule, node: Node) -> ByteGrid:
    """Return the grid of a dequantize node; all of uint8, for clamping was done where the integers were made."""
    _, scale, zero_point = node.args
    return ByteGrid(_number(exact, scale), int(_number(exact, zero_point)), 0, UINT8_MAX)


def _behind_clips(source: Node, grid: ByteGrid) -> tuple[Node | None, ByteGrid]:
    """Return the op that a quantizer writes for, None where others read it too, and the grid behind the clips."""
    # The output grid takes over the clips, as in the kernels: rounding is monotonic, so clipping integers is the same.
    clips: list[tuple[float, float]] = []
    while len(source.users) == 1:
        rule = rule_of(source)
        if rule is None or rule.scale is not ScaleRule.ABSORB or not isinstance(source.args[0], Node):
            low, high = -torch.inf, torch.inf
            for first, last in reversed(clips):
                # The later clip wins where two do not overlap.
                low, high = (min(max(bound, first), last) for bound in (low, high))
            return source, grid.clipped(low, high)
        clips.append(clip_bounds(source))
        source = source.args[0]
    return None, grid


def _operands(node: Node) -> tuple[Node, ...]:
    rule = rule_of(node)
    positions = rule.activations if rule is not None else ()
    return tuple(n for n in (node.args[k] for k in positions if k < len(node.args)) if isinstance(n, Node))


def _layer(exact: GraphModule, node: Node, rule: Requantization, out: ByteGrid | None) -> ExactLayer | None:
    """Return a weighted op with integer input and weights as a module, None for any other node."""
    row = rule_of(node)
    formula = None if row is None else rule.named.get(node.name, rule.layers.get(row.kind))
    if row is None or row.weight is None or row.bias is None or formula is None or node.kwargs:
        return None
    source, weight, *rest = node.args
    bias = rest[0] if rest else None
    if not _is(source, dequantize) or not _is(weight, dequantize_channels) or (bias is not None and not _is(bias)):
        return None
    assert isinstance(source, Node)
    assert isinstance(weight, Node)
    integers, scales = constant(exact, weight.args[0]), constant(exact, weight.args[1])
    offsets = constant(exact, bias.args[0]) if isinstance(bias, Node) else None
    if integers is None or scales is None or weight.args[2] != 0:
        return None
    assert callable(node.target)
    op = partial(_weighted, node.target, tuple(rest[1:]))
    joined = None if integers.dim() == 2 or rule.joined is None else rule.joined(node, integers)
    return ExactLayer(formula, op, integers, scales, offsets, _grid(exact, source), out, joined)


def _fused_sum(
    exact: GraphModule, node: Node, rule: Requantization, out: ByteGrid
) -> tuple[ExactLayer, tuple[Node, Node]] | None:
    """Return a layer that adds a uint8 operand, and what both read, for a sum of that form; None otherwise."""
    row, operands = rule_of(node), _operands(node)
    if row is None or not row.adds or row.scale is not ScaleRule.OWN:
        return None
    for summand, other in (operands, operands[::-1]) if len(operands) == 2 else ():
        its = rule_of(summand)
        if its is None or its.kind not in rule.adding or len(summand.users) > 1 or not _is(other, dequantize):
            continue
        layer = _layer(exact, summand, rule, out)
        if layer is not None:
            layer.addend = _grid(exact, other)
            return layer, (_integers(summand.args[0]), _integers(other))
    return None


def _weighted(target: Callable[..., Tensor], rest: tuple[object, ...], x: Tensor, weight: Tensor) -> Tensor:
    return target(x, weight, None, *rest)


def _is(node: object, target: object = dequantize_channels) -> bool:
    return isinstance(node, Node) and node.target is target


def _join(exact: GraphModule, node: Node, rule: Requantization, out: ByteGrid) -> ExactJoin | None:
    """Return an op without weights on integer inputs as a module, None where it has no integer form."""
    row, sources = rule_of(node), _operands(node)
    formula = rule.joins.get(row.kind) if row is not None and row.scale is ScaleRule.OWN else None
    if formula is None or not sources or not all(_is(source, dequantize) for source in sources):
        return None
    return ExactJoin(formula(node, [_grid(exact, source) for source in sources], out), out)
