"""A plan or a result made elsewhere, for a graph of the same model that was captured another way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation
from fxquant.core.ir import fork
from fxquant.result import Result


def renamed(plan: BitAllocation, sites: Sequence[str]) -> BitAllocation:
    """Return a plan for sites of these names: its own where they agree, else one after the other.

    Args:
        plan: its sites in the order of their graph.
        sites: names in the order of this graph.

    Raises:
        OptionError: the plan has more or fewer sites, or shared names stand at other places.
    """
    names = list(plan.choices)
    if set(names) == set(sites):
        return plan
    shared = set(names) & set(sites)
    moved = [name for name in shared if len(names) == len(sites) and names.index(name) != list(sites).index(name)]
    if len(names) != len(sites) or moved:
        raise OptionError(
            f"the plan does not fit the compiled graph: it names {len(names)} layers, the graph has {len(sites)}; "
            f"only in the plan: {', '.join(n for n in names if n not in shared) or 'none'}; "
            f"only in the graph: {', '.join(s for s in sites if s not in shared) or 'none'}"
            + (f"; at another place: {', '.join(sorted(moved))}" if moved else "")
        )
    return BitAllocation(dict(zip(sites, plan.choices.values(), strict=True)))


def graph_of(result: Result, module: GraphModule) -> GraphModule:
    """Return the integer graph of a result, its inputs in the order of a graph of the same model.

    Raises:
        OptionError: the result was made from another model, or from other weights.
    """
    check_same_model(result, module)
    inputs, lowered = input_nodes(module), fork(result.lowered)
    # Called by position, answering with a flat tuple, as graphs of Dynamo's are.
    lowered.graph.set_codegen(CodeGen())
    there = input_nodes(lowered)
    if set(there) == set(inputs):
        first = next(iter(lowered.graph.nodes))
        for name in inputs:
            if there[name] is first:
                # What is put before a node needs the node to stand still.
                first = first.next
            else:
                first.prepend(there[name])
    lowered.recompile()
    return lowered


def input_nodes(module: GraphModule) -> dict[str, Node]:
    """Return the inputs of a graph in order, by name."""
    return {str(node.target): node for node in module.graph.nodes if node.op == "placeholder"}


def check_same_model(result: Result, module: GraphModule) -> None:
    """Refuse a result whose weights are not those of a compiled graph, whatever their names.

    Raises:
        OptionError: names the first weight that differs.
    """
    exported = result.program[ExportedProgram]
    there = {name: exported.state_dict[name] for name in exported.graph_signature.parameters}
    here = dict(module.named_parameters())
    for name, tensor in here.items():
        if not any(_same(tensor, other) for other in (there.get(name), *there.values())):
            alike = "its values differ" if name in there else "the result has none of that name or of those values"
            raise OptionError(
                f"the result does not belong to the compiled model: weight {name!r} of shape {tuple(tensor.shape)}: "
                f"{alike}; quantize this model, or compile the one the result was made from"
            )
    lacking = [name for name, tensor in there.items() if not any(_same(tensor, other) for other in here.values())]
    inputs, wanted = input_nodes(module), input_nodes(result.program.module)
    if lacking or len(inputs) != len(wanted):
        raise OptionError(
            f"the result is of more than the compiled graph: the graph lacks {', '.join(lacking) or 'nothing'} and "
            f"reads {', '.join(inputs)}, the result {', '.join(wanted)}; graph breaks split a model, "
            "TORCH_LOGS=graph_breaks shows them"
        )


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one.detach().cpu(), other.detach().cpu())
