"""Cut one op out of a network, with the quantizers around it, as a graph of its own."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from fxquant.core.ir import ScaleRule, consumers, rule_of, sample_shape


def cut_out(module: GraphModule, node: Node) -> tuple[GraphModule, tuple[int, ...]]:
    """Return a graph of one weighted op with its quantizers and the clip it absorbs, and the shape of its input
    for one image.

    Args:
        module: float or simulated graph.
        node: op whose first argument is its activation and whose other tensor arguments are constants.
    """
    source = node.args[0]
    assert isinstance(source, Node)
    quantizer = [source] if source.op == "call_module" else []
    outside = source.all_input_nodes[0] if quantizer else source
    operands = [n for n in node.all_input_nodes if n is not source]
    chain = [*(n for operand in operands for n in _with_inputs(operand)), *quantizer, node, *_behind(node)]
    graph = Graph()
    start = graph.placeholder("x")
    start.meta = dict(outside.meta)
    copies: dict[Node, Node] = {outside: start}
    for each in chain:
        copies[each] = graph.node_copy(each, copies.__getitem__)
    graph.output(copies[chain[-1]])
    return GraphModule(module, graph), sample_shape(outside)


def _with_inputs(node: Node) -> list[Node]:
    return [*(n for source in node.all_input_nodes for n in _with_inputs(source)), node]


def _behind(node: Node) -> list[Node]:
    """Return the clip an op absorbs and the quantizer of its output."""
    users = consumers(node)
    if len(users) != 1:
        return []
    if users[0].op == "call_module":
        return [users[0]]
    rule = rule_of(users[0])
    return [users[0], *_behind(users[0])] if rule is not None and rule.scale is ScaleRule.ABSORB else []
