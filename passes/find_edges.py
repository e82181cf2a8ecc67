"""Decide which edges carry a quantizer: the inputs of integer ops, and what the runtime's kernels need around them.

1. The activation input of every weighted op with an integer kernel is quantized.
2. Where the kernel can only write integers (ONNX Runtime's convolution), every use of its output is quantized, behind
   the clipping activation it absorbs.
3. An op without weights that has an integer kernel (a join: add, concat, pooling) runs in integers if its output is
   wanted quantized and all its inputs are quantized anyway; the joins are the largest set for which that holds.
4. An op on two activations that the target wants on grids (products inside attention) has both of them quantized.
5. Where the kernel adds a second operand before it rounds, a value that only that sum reads needs no quantizer.
6. Values pass through ops that keep the grid (reshape, max pool, zero padding), so the quantizer goes in front of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxquant.core.facts import Target
from fxquant.core.ir import (
    BETWEEN,
    OPS,
    REFUSED,
    SINGLE,
    Edge,
    OpRule,
    Program,
    QuantizedEdges,
    ScaleRule,
    activation_inputs,
    consumers,
    edges_between,
    is_constant,
    rule_of,
    shape_of,
    site_name,
)
from fxquant.passes.base import Pass

PASS_THROUGH = (ScaleRule.KEEP, ScaleRule.SHARE)
"""Ops whose output lies on a grid as soon as their inputs do, without arithmetic."""


@dataclass(frozen=True)
class FindEdges(Pass):
    """Write `QuantizedEdges` for a target.

    Args:
        target: says which kinds of op run in integers.
        keep_float: site name -> reason, for sites that stay in float whatever the target can do.
    """

    target: Target
    keep_float: dict[str, str] = field(default_factory=dict)
    writes = (QuantizedEdges,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its quantized edges known."""
        search = _EdgeSearch(program.module.graph, self.target, self.keep_float)
        return program.with_facts(search.solve()), 0


def _computed_bias(node: Node, rule: OpRule) -> bool:
    bias = node.args[rule.bias] if rule.bias is not None and len(node.args) > rule.bias else None
    return bias is not None and not is_constant(bias)


def _makes_tensors(node: Node) -> bool:
    """Whether a node computes tensors, not sizes or members of a tuple."""
    return isinstance(node.target, OpOverload) and any(
        "Tensor" in str(result.type) for result in node.target._schema.returns
    )


def _foreign_type(node: Node) -> str | None:
    """Return why an op whose values are not float32 keeps them, None where they are."""
    types = {value.meta["val"].dtype for value in (node, *activation_inputs(node)) if _is_float(value)}
    foreign = sorted(str(kind).removeprefix("torch.") for kind in types - {torch.float32})
    return f"it computes in {' and '.join(foreign)}, and quantizers are for float32" if foreign else None


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


class _EdgeSearch:
    def __init__(self, graph: Graph, target: Target, keep_float: dict[str, str]) -> None:
        self.nodes: list[Node] = list(graph.nodes)
        self.target = target
        self.reasons: dict[str, str] = {}
        # Fixed from here on: rules 1 and 4. Only the joins depend on each other.
        self.weighted = [node for node in self.nodes if self._is_integer_weighted(node, keep_float)]
        self.products = [node for node in self.nodes if self._is_product(node)]
        self.joins = {node for node in self.nodes if node not in self.products and self._may_join(node)}

    def _is_integer_weighted(self, node: Node, keep_float: dict[str, str]) -> bool:
        rule = rule_of(node)
        # Reasons are kept for every op that does work, so that the report can name one for each layer in float.
        if node.op == "call_function" and node.target in REFUSED:
            self.reasons[node.name] = REFUSED[node.target]
        if rule is None or rule.weight is None:
            return False
        weight = node.args[rule.weight]
        if not isinstance(weight, Node) or not is_constant(weight):
            self.reasons[node.name] = "its weight is computed by the graph, not a parameter"
        # Order of the reasons: what the graph is comes before what the target lacks, and that before the user's wish.
        elif is_constant(node.args[0]):
            self.reasons[node.name] = "its input is a constant, so it could be computed beforehand"
        elif _computed_bias(node, rule):
            self.reasons[node.name] = "its bias is computed by the graph, not a parameter"
        elif (foreign := _foreign_type(node)) is not None:
            self.reasons[node.name] = foreign
        elif rule.kind not in self.target.kernels:
            self.reasons[node.name] = f"target {self.target.name!r} has no integer kernel for {rule.kind}"
        elif site_name(str(weight.target)) in keep_float:
            self.reasons[node.name] = keep_float[site_name(str(weight.target))]
        else:
            return True
        return False

    def _is_product(self, node: Node) -> bool:
        """Whether a node multiplies two activations that the target takes on grids of their own."""
        rule = rule_of(node)
        if rule is None or rule.kind not in self.target.products or rule.weight is not None:
            return False
        inputs = activation_inputs(node)
        return bool(inputs) and not any(is_constant(source) for source in inputs)

    def _may_join(self, node: Node) -> bool:
        rule = rule_of(node)
        if node.op != "call_function" or (rule is not None and rule.weight is not None):
            return False
        why = self._float_reason(node, rule)
        if why is not None:
            self.reasons.setdefault(node.name, why)
        return why is None and rule is not None and rule.scale is ScaleRule.OWN

    def _float_reason(self, node: Node, rule: OpRule | None) -> str | None:
        """Return why an op without weights runs in float whatever its neighbours do, None if it need not."""
        if rule is None:
            return BETWEEN.get(node.target, "the op table has no row for it") if _makes_tensors(node) else None
        if rule.kind in self.target.refuse_joins:
            return self.target.refuse_joins[rule.kind]
        foreign = _foreign_type(node)
        if foreign is not None:
            return foreign
        # `rule` is a float row for refused forms; the op table's own row knows why.
        full = OPS[node.target]
        if full.refuse is not None and (why := full.refuse(node)):
            return why
        if rule.scale is ScaleRule.FLOAT:
            return f"{rule.kind} is computed in float"
        # Ops that pass a grid through or absorb it never get a quantizer, so there is nothing to refuse.
        if rule.scale is not ScaleRule.OWN:
            return None
        if rule.kind not in self.target.joins:
            return SINGLE if rule.pointwise else f"target {self.target.name!r} has no integer kernel for {rule.kind}"
        inputs = activation_inputs(node)
        return "one operand is a constant" if not inputs or any(is_constant(source) for source in inputs) else None

    def solve(self) -> QuantizedEdges:
        """Shrink the set of joins until each of them has quantized inputs and a wanted output."""
        # One join's output may be another's input, so a join that drops out may take others with it. Starting from all
        # of them and only removing ends at the largest set that fits.
        while True:
            # What a join asks for itself must not count as quantized anyway, or every join would justify itself.
            quantized = {edge.producer for edge in self._edges(join_inputs=False)}
            unfit = {join for join in self.joins if not self._fits(join, quantized)}
            if not unfit:
                break
            self.joins -= unfit
            for join in unfit:
                self.reasons[join.name] = "its inputs or its output are in float anyway"
        # Only now: which sums are fused depends on which joins are left.
        unrounded = {edge for join in self.joins for edge in self._unrounded(join)}
        edges = self._edges()
        integer = {node.name for node in (*self.weighted, *self.products, *self.joins)}
        reasons = {name: why for name, why in self.reasons.items() if name not in integer}
        return QuantizedEdges(
            tuple(edge for edge in edges if edge not in unrounded),
            frozenset(integer),
            reasons,
            tuple(edge for edge in edges if edge in unrounded),
        )

    def _fits(self, join: Node, quantized: set[str]) -> bool:
        # A reshape in between carries the grid of the value above it, so that value is what must be quantized.
        fed = all(root.name in quantized for source in activation_inputs(join) for root in self._roots(source))
        return fed and self._wanted(self._tail(join))

    def _wanted(self, value: Node) -> bool:
        """Whether some reader computes on integers, straight or through ops that keep the grid."""
        for user in consumers(value):
            rule = rule_of(user)
            if user in self.joins or user in self.products or (user in self.weighted and value is user.args[0]):
                return True
            # A reshape or a pool keeps the grid: what matters is who reads behind it.
            if rule is not None and rule.scale in PASS_THROUGH and self._wanted(user):
                return True
        return False

    def _roots(self, value: Node) -> list[Node]:
        """Return the values that need a quantizer so that `value` lies on a grid."""
        rule = rule_of(value)
        if rule is None or rule.scale not in PASS_THROUGH:
            return [value]
        return [root for source in activation_inputs(value) for root in self._roots(source)] or [value]

    def _tail(self, node: Node) -> Node:
        """Return the node whose value the kernel writes: the absorbed clip, or the op itself."""
        # Only a clip that is the sole reader can be part of the kernel: others need the value before it.
        users = list(node.users)
        rule = rule_of(users[0]) if len(users) == 1 else None
        return users[0] if rule is not None and rule.scale is ScaleRule.ABSORB else node

    def _edges(self, join_inputs: bool = True) -> list[Edge]:
        found: dict[Edge, None] = {}
        for node in self.weighted:
            source = node.args[0]
            assert isinstance(source, Node)
            self._quantize_input(source, node, found)
            rule = rule_of(node)
            # A kernel that only writes integers needs a grid to write them on, even for readers in float.
            if rule is not None and rule.kind in self.target.output_quantized:
                self._quantize_output(self._tail(node), found)
        for product in self.products:
            for source in activation_inputs(product):
                self._quantize_input(source, product, found)
        for join in self.joins:
            for source in activation_inputs(join) if join_inputs else ():
                self._quantize_input(source, join, found)
            self._quantize_output(self._tail(join), found)
        # Graph order, whatever order they were found in: groups and sites are named after the first edge.
        order = {node.name: index for index, node in enumerate(self.nodes)}
        return sorted(found, key=lambda edge: (order[edge.producer], order[edge.consumer], edge.slot))

    def _unrounded(self, join: Node) -> list[Edge]:
        """Return the edges into a sum that is computed by the kernel of one of its operands: the last to be ready."""
        rule, operands = rule_of(join), activation_inputs(join)
        if rule is None or not rule.adds or len(operands) != 2 or operands[0] is operands[1]:
            return []
        fit = [source for source in operands if self._adds_before_rounding(source, join)]
        # A kernel adds element by element and does not broadcast.
        if not fit or shape_of(operands[0]) != shape_of(operands[1]):
            return []
        # Of two convolutions the earlier one writes integers, and the later one adds them: then both are known.
        return edges_between(max(fit, key=self.nodes.index), join)

    def _adds_before_rounding(self, source: Node, join: Node) -> bool:
        rule = rule_of(source)
        fused = rule is not None and rule.kind in self.target.fused_sums
        # With a second reader the unrounded value would have to be written to memory after all.
        return fused and source in self.weighted and consumers(source) == [join]

    def _quantize_input(self, source: Node, reader: Node, found: dict[Edge, None]) -> None:
        """Quantize the edge, and the edges into the ops that keep the grid above it."""
        for edge in edges_between(source, reader):
            found[edge] = None
        rule = rule_of(source)
        # Else a max pool in front of a convolution would run in float, between the quantizer above it and this one.
        if rule is not None and rule.scale in PASS_THROUGH:
            for above in activation_inputs(source):
                self._quantize_input(above, source, found)

    def _quantize_output(self, value: Node, found: dict[Edge, None]) -> None:
        """Quantize every use of a value, and the uses of what only rearranges it where someone computes on it."""
        for user in consumers(value):
            for edge in edges_between(value, user):
                found[edge] = None
