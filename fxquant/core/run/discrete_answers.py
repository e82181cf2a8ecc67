"""Which outputs of a graph jump where their inputs change a little, and the last values in front of the jumps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxquant.core.ir import is_constant, rule_of
from fxquant.core.run.runner import dependents, placeholders

STEPS = frozenset({"round", "floor", "ceil", "trunc", "sign", "sgn", "heaviside"})
"""Ops on floats that are constant between jumps, by the name of their packet: their derivative is 0."""


ORDERS = frozenset({"sort", "argsort", "topk", "kthvalue", "median", "nanmedian", "mode"})
"""Ops that choose among equal values in an order of each runtime's own; on a grid many values are equal."""


def is_step(node: Node) -> bool:
    """Whether a node is one of `STEPS`."""
    return op_name(node) in STEPS


def op_name(node: Node) -> str:
    """Return the name of a node's op without its overload, "" of what is no call of a function."""
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(node.target, "__name__", "")) if packet is None else str(packet).rpartition(".")[2]


def is_float(value: object) -> bool:
    """Whether a value is a tensor of floats, or several of which one is."""
    tensors = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(t, Tensor) and t.is_floating_point() for t in tensors)


@dataclass(frozen=True)
class Jump:
    """An output that jumps, with the names of what is in front of its jumps.

    Args:
        fronts: the nearest values without jumps that it is computed from.
        leading: what those values show of, where it is neither an output nor compared as a quantized edge already.
    """

    fronts: tuple[str, ...]
    leading: tuple[str, ...]


def discrete_answers(graph: Graph) -> dict[int, Jump]:
    """Return the outputs that jump, by their position among the tensors returned.

    Class numbers, masks and orders of scores jump, and so does what is picked or masked by them: between two scores
    that are nearly equal, the last bit decides.
    """
    jumps = _jumping(graph)
    outputs = [node for node in returned(graph) if isinstance(node.meta.get("val"), Tensor)]
    found = {}
    for position, output in enumerate(outputs):
        if output in jumps:
            fronts = _in_front(output, jumps)
            shown = dict.fromkeys(_unmoved(node) for node in fronts)
            leading = (n for n in shown if n not in outputs and n.op not in ("placeholder", "call_module"))
            found[position] = Jump(*(tuple(node.name for node in nodes) for nodes in (fronts, leading)))
    return found


def behind_orders(graph: Graph) -> frozenset[str]:
    """Return the quantizers of values that were picked by an order of values, no other quantizer in between."""
    picked, found = set[Node](), set[str]()
    for node in graph.nodes:
        if op_name(node) not in ORDERS and picked.isdisjoint(node.all_input_nodes):
            continue
        if node.op == "call_module":
            found.add(node.name)
        else:
            picked.add(node)
    return frozenset(found)


def leading_names(graph: Graph) -> dict[str, str]:
    """Return each value that leads to a jump -> its name in files: lead0, lead1, ..."""
    every = dict.fromkeys(name for jump in discrete_answers(graph).values() for name in jump.leading)
    return {name: f"lead{number}" for number, name in enumerate(every)}


def returned(graph: Graph) -> list[Node]:
    """Return the nodes that a graph returns, in order; one returned twice is there twice."""
    returned = list[Node]()
    map_arg(graph.output_node().args, returned.append)
    return returned


def _jumping(graph: Graph) -> set[Node]:
    """Return the values that depend on a comparison, choice, order or rounding of floats."""
    varying = dependents(graph.nodes, placeholders(graph))
    from_floats, jumps = set[Node](), set[Node]()
    for node in graph.nodes:
        value, read = node.meta.get("val"), [n for n in node.all_input_nodes if n in varying]
        if node not in varying or node.op in ("placeholder", "output"):
            continue
        floats = any(is_float(n.meta.get("val")) or n in from_floats for n in read)
        from_floats.update([node] if floats else [])
        decides = isinstance(value, Tensor) and not value.is_floating_point() and floats
        if decides or is_step(node) or not jumps.isdisjoint(read):
            jumps.add(node)
    return jumps


def _in_front(output: Node, jumps: set[Node]) -> list[Node]:
    """Return the floats without jumps that an output with jumps is computed from, the nearest ones."""
    waiting, seen, found = [output], set[Node](), list[Node]()
    while waiting:
        node = waiting.pop()
        if node in seen or is_constant(node) or node.op == "placeholder":
            continue
        seen.add(node)
        if node in jumps or not isinstance(node.meta.get("val"), Tensor):
            waiting += node.all_input_nodes
        elif is_float(node.meta["val"]):
            found.append(node)
    return found


def _unmoved(node: Node) -> Node:
    """Return the value that a node shows in another order or shape: runtimes move it where they like."""
    while (rule := rule_of(node)) is not None and rule.is_view and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
