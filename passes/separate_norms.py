"""Give every use of a batch norm statistics and parameters of its own, where several levels of a network share one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.core.ir import Program, tensor_at
from fxquant.passes.base import Pass
from fxquant.passes.fold_batchnorm import is_norm

OPERANDS = range(1, 5)
"""Positions of scale, shift, mean and variance."""


@dataclass(frozen=True)
class SeparateNorms(Pass):
    """Copy the tensors that several batch norms read, so that each has its own (AQD, arXiv 2007.06919, section 3.3).

    The network computes the same; statistics of one level can then change without those of another.
    """

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with separate norms."""
        module, owners, copied = program.module, dict[str, Node](), 0
        for norm in [node for node in module.graph.nodes if is_norm(node)]:
            for position in OPERANDS:
                source = norm.args[position]
                if not isinstance(source, Node) or source.op != "get_attr":
                    continue
                if owners.setdefault(str(source.target), norm) is not norm:
                    _copy(module, norm, position, source)
                    copied += 1
        return program, copied


def _copy(module: GraphModule, norm: Node, position: int, source: Node) -> None:
    path = f"{source.target}_{norm.name}"
    parent, _, leaf = path.rpartition(".")
    value, holder = tensor_at(module, str(source.target)), module.get_submodule(parent)
    if isinstance(value, nn.Parameter):
        setattr(holder, leaf, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
    else:
        holder.register_buffer(leaf, value.detach().clone())
    with module.graph.inserting_before(norm):
        own = module.graph.get_attr(path)
    own.meta = dict(source.meta)
    norm.update_arg(position, own)
