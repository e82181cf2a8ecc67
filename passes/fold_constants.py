"""Compute once what does not depend on the images: standardised weights, tables of relative positions, masks.

A weight that is computed from parameters becomes a parameter itself, so that its layer can run on integers.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.core.ir import Program, erase_dead, fork, is_constant, rule_of, tensor_at
from fxquant.passes.base import Pass

ROOM = 2**20
"""Bytes that a computed value may always have."""
GROWTH = 4
"""Times the bytes of the parameters it is made of that a larger value may have."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace every largest subgraph that reads parameters and buffers only by the value it computes.

    Left alone: random ops, views of a single parameter that no op takes as a weight (they cost nothing, and a copy
    would no longer be the parameter), and values much larger than what they are made of. The value of a trainable
    parameter is trainable.
    """

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its constants computed."""
        module = program.module
        values: dict[Node, Any] = {}
        sources: dict[Node, dict[str, Tensor]] = {}
        with torch.no_grad():
            for node in module.graph.nodes:
                _evaluate(module, node, values, sources)
        ends = [node for node in values if _is_end(node, values) and _is_worth_it(node)]
        for node in ends:
            _replace(module, node, values[node], sources[node], values)
        erase_dead(module)
        # A new fork holds only what is still read.
        return replace(program, module=fork(module)), len(ends)


def _evaluate(module: GraphModule, node: Node, values: dict[Node, Any], sources: dict[Node, dict[str, Tensor]]) -> None:
    """Note the value of a node that depends on no image, and the parameters it is made of."""
    if is_constant(node) and isinstance(node.meta.get("val"), Tensor):
        tensor = tensor_at(module, str(node.target))
        values[node], sources[node] = tensor.detach(), {str(node.target): tensor}
        return
    if not _is_pure(node) or any(source not in values for source in node.all_input_nodes):
        return
    read = {path: tensor for source in node.all_input_nodes for path, tensor in sources[source].items()}
    members = node.meta.get("val")
    made = [t for t in (members if isinstance(members, tuple | list) else [members]) if isinstance(t, Tensor)]
    limit = max(ROOM, GROWTH * sum(tensor.nbytes for tensor in read.values()))
    # Asked of the traced value: a table too large to keep need not be made.
    if any(t.numel() * t.element_size() > limit for t in made):
        return
    args: Any = map_arg(node.args, values.__getitem__)
    kwargs: Any = map_arg(node.kwargs, values.__getitem__)
    assert callable(node.target)
    values[node], sources[node] = node.target(*args, **kwargs), read


def _is_pure(node: Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op == "call_function"
    target = node.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


def _is_end(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a computed tensor is read by what depends on the images."""
    return not is_constant(node) and isinstance(values[node], Tensor) and any(user not in values for user in node.users)


def _is_worth_it(node: Node) -> bool:
    return any(_weight_of(user) is node for user in node.users) or not _is_view(node)


def _weight_of(node: Node) -> object:
    rule = rule_of(node)
    return node.args[rule.weight] if rule is not None and rule.weight is not None else None


def _is_view(node: Node) -> bool:
    """Whether a node only shows a parameter in another shape."""
    if is_constant(node):
        return True
    rule = rule_of(node)
    return rule is not None and rule.is_view and all(_is_view(source) for source in node.all_input_nodes)


def _replace(
    module: GraphModule, node: Node, value: Tensor, sources: dict[str, Tensor], values: dict[Node, Any]
) -> None:
    """Put the value at the path of the largest parameter it is made of, or beside it, and let it be read there."""
    # An index or a mask is no weight, however large.
    largest = max(sources, key=lambda p: (sources[p].is_floating_point(), sources[p].numel()), default="")
    readers = [user for n in module.graph.nodes if n.op == "get_attr" and n.target == largest for user in n.users]
    path = largest if largest and _only_for(node, readers, values) else _free_path(module, largest, node.name)
    *parents, leaf = path.split(".")
    holder = module.get_submodule(".".join(parents))
    if hasattr(holder, leaf):
        delattr(holder, leaf)
    kept = value.clone(memory_format=torch.contiguous_format)
    if value.is_floating_point() and any(tensor.requires_grad for tensor in sources.values()):
        setattr(holder, leaf, nn.Parameter(kept))
    else:
        holder.register_buffer(leaf, kept)
    with module.graph.inserting_before(node):
        made = module.graph.get_attr(path)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user not in values)


def _only_for(node: Node, readers: list[Node], values: dict[Node, Any]) -> bool:
    """Whether nothing but this node is computed from what these nodes make."""
    pending, seen = list(readers), set[Node]()
    while pending:
        reader = pending.pop()
        if reader is node or reader in seen:
            continue
        if reader not in values:
            return False
        seen.add(reader)
        pending.extend(reader.users)
    return all(user not in seen for user in node.users)


def _free_path(module: GraphModule, largest: str, name: str) -> str:
    """Return a path beside a parameter that nothing has yet."""
    beside = f"{largest}_" if largest else ""
    path, number = f"{beside}folded_{name}", 0
    *parents, _ = path.split(".")
    holder = module.get_submodule(".".join(parents))
    while hasattr(holder, path.rpartition(".")[2]):
        number += 1
        path = f"{beside}folded_{name}_{number}"
    return path
