"""What PyTorch's integer kernels compute on every quantized edge, eagerly or compiled by Inductor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxquant.backends.exact import Trace, Tracer, activation_quantizers, outputs
from fxquant.backends.int8.inductor import compiled
from fxquant.core.ir import ScaleRule, finish, fork, rule_of
from fxquant.core.run import leading_names


def lowered_edges(module: GraphModule, lowered: GraphModule) -> dict[str, str]:
    """Return edge -> node of a graph lowered to PyTorch's kernels that makes its integers, where there is one."""
    places = {node.name: index for index, node in enumerate(lowered.graph.nodes)}
    found = {}
    for node in activation_quantizers(module):
        name = next((name for name in _makers(node) if name in places), None)
        if name is not None:
            found[node.name] = name
    return found


def _makers(node: Node) -> list[str]:
    """Return what the maker of a quantizer's integers may be called: itself, or the op that writes for it."""
    names, source = [node.name], node.args[0]
    while isinstance(source, Node):
        names.append(source.name)
        rule = rule_of(source)
        if rule is None or rule.scale is not ScaleRule.ABSORB or len(source.users) > 1:
            break
        source = source.args[0]
    return names


def lowered_tracer(module: GraphModule, lowered: GraphModule, inductor: bool = False) -> Tracer:
    """Return what runs a lowered graph and reports the integers on its edges.

    The edges are returned as further outputs of one graph, so that the same form runs eagerly and compiled.

    Args:
        module: the simulated graph it was made of.
        lowered: from `FxInt8Backend.lower`; its kernels no longer reuse the memory of their operands.
        inductor: run it through torch.compile.
    """
    watched = fork(lowered)
    for part in watched.modules():
        if "may_overwrite" in vars(part):
            # Edges are read when all is done: no kernel may write over its operand.
            vars(part)["may_overwrite"] = False
    graph: Graph = watched.graph
    by_name = {node.name: node for node in graph.nodes}
    edges, leads = lowered_edges(module, lowered), [n for n in leading_names(module.graph) if n in by_name]
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = ((output.args[0], *(tuple(by_name[name] for name in names) for names in (edges.values(), leads))),)
    # The answer is a tuple now, whatever structure the model's own has.
    graph.set_codegen(torch.fx.graph.CodeGen())
    finish(watched)
    call = compiled(watched) if inductor else watched

    def run(inputs: tuple[Tensor, ...]) -> Trace:
        with torch.no_grad():
            answer, integers, values = call(*inputs)
        seen = {name: value for name, value in zip(edges, integers, strict=True) if value.dtype is torch.uint8}
        first, *others = outputs(answer)
        leading = {name: value for name, value in zip(leads, values, strict=True) if value.is_floating_point()}
        return Trace(first, seen, tuple(others), leading)

    return run
