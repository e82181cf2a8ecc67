"""Which values of a graph change a little where its weights do."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from fxquant.core.ir import is_constant
from fxquant.core.run.discrete_answers import is_float, is_step
from fxquant.core.run.runner import dependents, placeholders


def smooth_values(graph: Graph) -> set[Node]:
    """Return the floats that depend on the input such that a small change of weights changes them a little.

    Not those that class numbers or masks alone are turned into, nor what is rounded, before another layer reads it.
    """
    varying = dependents(graph.nodes, placeholders(graph))
    computed, smooth = set[Node](), set[Node]()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node not in varying or node.op == "output":
            continue
        read = [source for source in node.all_input_nodes if source in varying]
        floats = [source for source in read if source in smooth or is_float(source.meta.get("val"))]
        #: values computed from floats, whatever their type
        if floats or any(source in computed for source in read):
            computed.add(node)
        if node.op == "call_module" or value is None:
            # Quantizers and kernels of simulated and lowered graphs, and what moves their integers: they mean floats.
            smooth.update([node] if any(source in smooth for source in read) else [])
        elif node.op == "placeholder" or not is_float(value):
            smooth.update([node] if node.op == "placeholder" and is_float(value) else [])
        elif not is_step(node) and (
            any(source in smooth for source in floats)
            # Rows of a table that are chosen by given numbers, as words are.
            or (not floats and not any(source in computed for source in read))
            or (floats and _has_weights(node))
        ):
            smooth.add(node)
    return smooth - set(placeholders(graph))


def _has_weights(node: Node) -> bool:
    return any(is_constant(n) and n.meta["val"].dim() > 1 for n in _unquantized(node) if "val" in n.meta)


def _unquantized(node: Node) -> Iterator[Node]:
    """Yield what a node reads, and what fake-quant nodes that it reads quantize."""
    for source in node.all_input_nodes:
        yield from source.all_input_nodes if source.op == "call_module" else (source,)
