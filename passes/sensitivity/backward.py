"""One forward pass with gradients: the first-order response of the answer to every column, image by image.

A column that shifts a weight by dW and an activation by dX moves `v . answer` by

    s(column) = sum over its ops of <g_Y, op(X, dW)> + sum over its activation nodes of <g_X, dX>

with g the gradient of `v . answer`. An op is linear in its weight, so `<g_Y, op(X, dW)>` is the exact product of dW
with the weight's gradient of each image, from one ordinary batched backward pass (MPQCO, arXiv 2110.06554, takes a
backward pass per image for it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.core.facts import FakeQuantNodes
from fxquant.core.ir import Sites, images_axis, rule_of
from fxquant.passes.sensitivity.columns import Column
from fxquant.passes.sensitivity.scorer import Batch, Scorer

Gradients = Mapping[str, Tensor]
"""Node name -> gradient, for ops of sites and activation fake-quant nodes; nodes without influence are left out."""


class Tape:
    """A run of the scorer's context on one batch, recorded for autograd.

    Args:
        scorer: the network, its context and its columns.
        batch: the batch.
    """

    def __init__(self, scorer: Scorer, batch: Batch) -> None:
        self.scorer = scorer
        self.images = len(batch.images)
        # A quantizer that returns its input itself would also collect the gradients of the input's other readers.
        apart = {name: _alias if change is scorer.off[name] else change for name, change in scorer.in_context.items()}
        inputs = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in batch.images.inputs)
        self.answer, self.environment = scorer.replay.recorded(inputs, apart)
        #: answer of the float network
        self.reference = self.answer.detach() if scorer.context is None else scorer.base(batch).reference
        nodes, by_name = scorer.program[FakeQuantNodes], scorer.replay.by_name
        sites = {site.name: site for site in scorer.program[Sites].sites}
        self.ops: dict[str, tuple[Node, ...]] = {
            name: tuple(by_name[node] for node in site.readers) for name, site in sites.items()
        }
        self._weights = {node: name for name, each in nodes.weights.items() for node in each}
        quantizers = [by_name[name] for each in nodes.activations.values() for name in each]
        watched = [*(value for ops in self.ops.values() for op in ops for value in self.values(op)), *quantizers]
        self._watched = [node for node in watched if self.environment[node].requires_grad]

    def gradients(self, cotangent: Tensor) -> Gradients:
        """Return the gradient of `sum(cotangent * answer)` at every watched node; one backward pass, data only."""
        tensors = [self.environment[node] for node in self._watched]
        found = torch.autograd.grad(self.answer, tensors, cotangent, retain_graph=True, allow_unused=True)
        self.scorer.replay.spent += self.scorer.network_cost
        return {node.name: g for node, g in zip(self._watched, found, strict=True) if g is not None}

    def output_shifts(self, column: Column) -> Iterator[tuple[Node, Tensor]]:
        """Yield `op(X, dW)` for every op that reads the column's weight."""
        for name, replacement in column.substitution.items():
            site = self._weights.get(name)
            if site is None:
                continue
            quantizer = self.scorer.replay.by_name[name]
            weight = self.environment[quantizer]
            delta = replacement(weight) - weight.detach()
            for op in self.ops[site]:
                if quantizer in op.all_input_nodes:
                    yield from self._shifts(op, quantizer, delta)

    def input_shifts(self, column: Column) -> Iterator[tuple[Node, Tensor]]:
        """Yield dX for every activation node that the column changes."""
        for name, replacement in column.substitution.items():
            if name in self._weights or replacement is self.scorer.in_context[name]:
                continue
            node = self.scorer.replay.by_name[name]
            source = self.environment[node.all_input_nodes[0]].detach()
            with torch.no_grad():
                yield node, replacement(source) - self.environment[node].detach()

    def responses(self, gradients: Sequence[Gradients]) -> Tensor:
        """Return s of every column: float64, shape (gradients, columns, images)."""
        columns = self.scorer.columns
        found = torch.zeros(len(gradients), len(columns), self.images, dtype=torch.float64)
        for index, column in enumerate(columns):
            for shifts in (self.output_shifts(column), self.input_shifts(column)):
                for node, shift in shifts:
                    for k, each in enumerate(gradients):
                        if node.name in each:
                            found[k, index] += per_image(node, each[node.name] * shift, self.images)
        return found

    def values(self, op: Node) -> list[Node]:
        """Return the nodes with the tensors that an op computes: itself, or the members of its answer that are read."""
        return [op] if isinstance(self.environment[op], Tensor) else list(op.users)

    def _shifts(self, op: Node, quantizer: Node, delta: Tensor) -> Iterator[tuple[Node, Tensor]]:
        """Yield how far a change of the weight moves each tensor that an op computes."""
        if rule_of(op) is not None:
            yield op, self._apply(op, quantizer, delta)
            return
        # A recurrent layer is not linear in its weights.
        values = {**{n: self.environment[n] for n in op.all_input_nodes}}
        moved = {**values, quantizer: values[quantizer] + delta}
        with torch.no_grad():
            before, after = (self.scorer.replay.value_of(op, each.__getitem__) for each in (values, moved))
        for node in self.values(op):
            one, other = (value if node is op else value[node.args[1]] for value in (before, after))
            yield node, other - one

    def _apply(self, op: Node, quantizer: Node, weight: Tensor) -> Tensor:
        """Run an op on its recorded input with another weight and without bias: it is linear in the weight then."""
        rule = rule_of(op)
        assert rule is not None
        values: dict[Node, Any] = {**{n: self.environment[n] for n in op.all_input_nodes}, quantizer: weight}
        bias = op.args[rule.bias] if rule.bias is not None and len(op.args) > rule.bias else None
        if isinstance(bias, Node):
            values[bias] = None
        with torch.no_grad():
            shift: Tensor = self.scorer.replay.value_of(op, values.__getitem__)
        return shift


def per_image(node: Node, value: Tensor, images: int) -> Tensor:
    """Return the sum of a node's values for each image, float64 of shape (images,); 0 without an axis of images."""
    axis = images_axis(node)
    if axis is None:
        return torch.zeros(images, dtype=torch.float64)
    if axis == 0 and len(value) == images:
        # Summed in the type of the values, pairwise: in float64 that takes five times as long.
        return value.sum(dim=[*range(1, value.dim())]).double().cpu() if value.dim() > 1 else value.double().cpu()
    # In an axis of images times windows or heads, images vary slowest.
    return value.movedim(axis, 0).reshape(images, -1).sum(dim=1, dtype=torch.float64).cpu()


def _alias(x: Tensor) -> Tensor:
    return x.view_as(x)
