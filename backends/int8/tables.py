"""Functions of one value, between two grids: 256 integers in, so a table of 256 answers them all.

An activation function that no convolution computes itself (LeakyReLU, hard-swish behind a split, GELU) would be made
float, computed, and rounded. Read from a table the integers are the same, in one pass over bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from fxquant.backends.int8.modules import Dequantize, IntegerMul, Quantize
from fxquant.core.ir import erase_dead, rule_of


class Lookup(nn.Module):
    """A function of single values, uint8 on a grid in, uint8 on another grid out.

    Args:
        function: dequantizes, computes and quantizes.
    """

    def __init__(self, function: GraphModule) -> None:
        super().__init__()
        self.function = function
        with torch.no_grad():
            table = function(torch.arange(256, dtype=torch.uint8))
        self.table: Tensor
        self.register_buffer("table", table, persistent=False)

    def forward(self, q: Tensor) -> Tensor:
        """Return the function of every value, in the memory order of q."""
        if torch.compiler.is_compiling():
            # A compiler fuses the three steps with what is around them.
            computed: Tensor = self.function(q)
            return computed
        order = sorted(range(q.dim()), key=q.stride, reverse=True)
        stored = q.permute(order)
        found = torch.index_select(self.table, 0, stored.flatten().to(torch.int32)).view(stored.shape)
        return found.permute([order.index(axis) for axis in range(q.dim())])


def look_up(lowered: GraphModule) -> None:
    """Replace functions of single values between two grids by tables."""
    changed = False
    for node in lowered.graph.nodes:
        region = _region(lowered, node) if isinstance(_called(lowered, node), Quantize) else []
        if not region:
            continue
        start = region[0]
        lowered.set_submodule(str(node.target), Lookup(_function(lowered, start.all_input_nodes[0], [*region, node])))
        node.args = start.args
        changed = True
    for node in lowered.graph.nodes:
        source = _multiplied_by_its_function(lowered, node)
        if source is None:
            continue
        table = Lookup(_function(lowered, source, [n for n in node.all_input_nodes if n is not source] + [node]))
        lowered.add_submodule(f"{node.target}_table", table)
        node.target, node.args = f"{node.target}_table", (source,)
        changed = True
    if changed:
        erase_dead(lowered)


def _multiplied_by_its_function(lowered: GraphModule, node: Node) -> Node | None:
    """Return the integers that a node multiplies by a table's function of themselves, as in SiLU; None for others."""
    if not isinstance(_called(lowered, node), IntegerMul):
        return None
    tables = [factor for factor in node.all_input_nodes if isinstance(_called(lowered, factor), Lookup)]
    sources = {factor.args[0] if factor in tables else factor for factor in node.all_input_nodes}
    source = sources.pop() if tables and len(sources) == 1 else None
    return source if isinstance(source, Node) else None


def _region(lowered: GraphModule, quantize: Node) -> list[Node]:
    """Return the one dequantization that a quantized value is made of, then the ops between in order; [] if there are
    others, or if something else reads what is between."""
    waiting, inside, starts = list(quantize.all_input_nodes), set[Node](), set[Node]()
    while waiting:
        node = waiting.pop()
        if isinstance(_called(lowered, node), Dequantize):
            starts.add(node)
        elif not _is_elementwise(node):
            return []
        elif node not in inside:
            inside.add(node)
            waiting += node.all_input_nodes
    if len(starts) != 1 or not inside or any(user not in inside | {quantize} for n in inside for user in n.users):
        return []
    return [*starts, *(node for node in lowered.graph.nodes if node in inside)]


def _is_elementwise(node: Node) -> bool:
    """Whether an op computes every value of its output from the same place of its inputs, all of which vary."""
    rule, target = rule_of(node), node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags or (rule is not None and rule.pointwise)


def _function(lowered: GraphModule, source: Node, nodes: list[Node]) -> GraphModule:
    """Return nodes in order as a function of the integers that the first of them reads."""
    graph = Graph()
    copies = {source: graph.placeholder("q")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[-1]])
    return GraphModule(lowered, graph)


def _called(lowered: GraphModule, node: Node) -> nn.Module | None:
    return lowered.get_submodule(str(node.target)) if node.op == "call_module" else None
