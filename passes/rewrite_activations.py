"""Rewrite SiLU as the product that it is, for targets with integer kernels of both factors.

    silu(x) = x sigmoid(x)

The sigmoid's values get a grid of their own, so that the simulation rounds them as the kernels do: one that knew
SiLU as one function would be a step off in 9 % of the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxquant.core.facts import Target
from fxquant.core.ir import OPS, Program
from fxquant.passes.base import Pass

aten = torch.ops.aten

GATES = {aten.silu.default: aten.sigmoid.default}
"""Function of x -> the function that x is multiplied by."""


@dataclass(frozen=True)
class RewriteActivations(Pass):
    """Rewrite functions of `GATES` as products where the target computes both of their ops on integers.

    Args:
        target: says which kinds of op run in integers.
    """

    target: Target

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its activations as products."""
        graph, changed = program.module.graph, 0
        for node in list(graph.nodes):
            gate = GATES.get(node.target)
            if gate is None or not {OPS[op].kind for op in (gate, aten.mul.Tensor)} <= self.target.joins:
                continue
            source = node.args[0]
            with graph.inserting_before(node):
                factor = graph.call_function(gate, (source,))
            factor.meta = dict(node.meta)
            # The node keeps its name: messages and reports of layers around it stay as they are.
            node.target, node.args, node.kwargs = aten.mul.Tensor, (source, factor), {}
            changed += 1
        return program, changed
