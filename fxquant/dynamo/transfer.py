"""Apply a plan or a saved result to a compiled graph of the same model, whose names and input order may differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from fxquant.backends import lower
from fxquant.backends.int8 import NAME as TARGET
from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation
from fxquant.core.ir import fork
from fxquant.core.run import placeholders
from fxquant.core.storage import StoredProgram
from fxquant.result import Result


def renamed(plan: BitAllocation, sites: Sequence[str]) -> BitAllocation:
    """Return a plan for sites of these names: matched by name where all agree, by position otherwise.

    Args:
        plan: its sites in the order of their graph.
        sites: names in the order of this graph.

    Raises:
        OptionError: the plan has more or fewer sites, or a shared name is at another position.
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
            + (f"; at another position: {', '.join(sorted(moved))}" if moved else "")
        )
    return BitAllocation(dict(zip(sites, plan.choices.values(), strict=True)))


def graph_of(result: Result, module: GraphModule) -> GraphModule:
    """Return the integer graph of a result, its inputs in the order of a graph of the same model.

    Raises:
        OptionError: the result was made from another model, or from other weights.
    """
    check_same_model(result, module)
    inputs, lowered = input_nodes(module), fork(lower(TARGET, result.simulated))
    # Dynamo calls a graph by position and expects a flat tuple.
    lowered.graph.set_codegen(CodeGen())
    there = input_nodes(lowered)
    if set(there) == set(inputs):
        first = next(iter(lowered.graph.nodes))
        for name in inputs:
            if there[name] is first:
                # It is in place; the others go before the node behind it.
                first = first.next
            else:
                first.prepend(there[name])
    lowered.recompile()
    return lowered


def input_nodes(module: GraphModule) -> dict[str, Node]:
    """Return the inputs of a graph in order, by name."""
    return {str(node.target): node for node in placeholders(module.graph)}


def check_same_model(result: Result, module: GraphModule) -> None:
    """Refuse a result whose weights are not those of a compiled graph; names do not matter.

    Raises:
        OptionError: names the first weight that differs.
    """
    exported = result.program[StoredProgram].exported
    there = {name: exported.state_dict[name] for name in exported.graph_signature.parameters}
    here = dict(module.named_parameters())
    for name, tensor in here.items():
        if not any(_same(tensor, other) for other in (there.get(name), *there.values())):
            reason = "its values differ" if name in there else "the result has none of that name or of those values"
            raise OptionError(
                f"the result does not belong to the compiled model: weight {name!r} of shape {tuple(tensor.shape)}: "
                f"{reason}; quantize this model, or compile the one the result was made from"
            )
    lacking = [name for name, tensor in there.items() if not any(_same(tensor, other) for other in here.values())]
    inputs, wanted = input_nodes(module), input_nodes(result.program.module)
    if lacking or len(inputs) != len(wanted):
        raise OptionError(
            f"the compiled graph is only part of the result's model: the graph lacks {', '.join(lacking) or 'nothing'} "
            f"and reads {', '.join(inputs)}, the result {', '.join(wanted)}; remove the graph breaks, which "
            "TORCH_LOGS=graph_breaks shows"
        )


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one.detach().cpu(), other.detach().cpu())
