"""Fold batch normalisation into the convolution or linear layer in front of it.

With y = gamma (W x + b - mean) / sqrt(var + eps) + beta and f = gamma / sqrt(var + eps):
    W' = f W (per output channel),    b' = f (b - mean) + beta.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxquant.core.errors import CaptureError
from fxquant.core.facts import NormStatistics, Statistics
from fxquant.core.ir import Program, constant, erase_dead, rule_of, set_parameter, shape_of, tensor_at
from fxquant.passes.base import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """Fold every batch normalisation whose only input is a weighted op with constant weights used once.

    What each of them knew of its input is written as `NormStatistics`.

    Raises:
        CaptureError: statistics that make weights which are not finite.
    """

    writes = (NormStatistics,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with foldable batch normalisation gone."""
        module = program.module
        folded: dict[str, Statistics] = {}
        for node in list(module.graph.nodes):
            if is_norm(node):
                folded |= _fold(module, node)
        erase_dead(module)
        return program.with_facts(NormStatistics(folded)), len(folded)


def is_norm(node: Node) -> bool:
    """Whether a node is a batch normalisation with stored statistics; its operands are scale, shift, mean, variance."""
    return node.target is aten._native_batch_norm_legit_no_training.default


def _fold(module: GraphModule, norm: Node) -> dict[str, Statistics]:
    producer, *statistics = norm.args[:5]
    outputs = [user for user in norm.users if user.target is operator.getitem and user.args[1] == 0]
    if not isinstance(producer, Node) or len(norm.users) != 1 or len(outputs) != 1 or len(producer.users) != 1:
        return {}
    rule = rule_of(producer)
    if rule is None or rule.weight is None or rule.bias is None:
        return {}
    weight, bias = (producer.args[p] if len(producer.args) > p else None for p in (rule.weight, rule.bias))
    w, b = constant(module, weight), constant(module, bias)
    gamma, beta, mean, variance = (constant(module, s) for s in statistics)
    if (
        not isinstance(weight, Node)
        or w is None
        or mean is None
        or variance is None
        or (bias is not None and b is None)
    ):
        return {}
    # Batch norm scales axis 1; a linear layer over tokens counts its outputs on the last axis instead.
    if w.dim() != len(shape_of(producer)):
        return {}
    # A weight that two layers share may be folded into neither: each would need its own.
    if sum(len(n.users) for n in module.graph.nodes if n.op == "get_attr" and n.target == weight.target) != 1:
        return {}
    epsilon = norm.args[6]
    assert isinstance(epsilon, float)
    factor = torch.rsqrt(variance.double() + epsilon) * (1.0 if gamma is None else gamma.double())
    shift = ((0.0 if b is None else b.double()) - mean.double()) * factor + (0.0 if beta is None else beta.double())
    path = str(weight.target)
    scaled = w.double() * factor.reshape([-1] + [1] * (w.dim() - 1))
    # Infinite means, negative variances: not seen in the weights alone.
    if not all(torch.isfinite(value.to(w.dtype)).all() for value in (scaled, shift)):
        raise CaptureError(
            f"the batch normalization behind {path!r} makes weights that are not finite; "
            "its statistics are broken (a mean that is infinite, a variance below 0), repair the checkpoint"
        )
    trainable = tensor_at(module, path).requires_grad
    # What could be trained before the folding can be trained after it: the simulated graph is the training graph.
    set_parameter(module, producer, rule.weight, path, scaled.to(w.dtype), trainable)
    set_parameter(module, producer, rule.bias, bias_path(module, producer, path), shift.to(w.dtype), trainable)
    outputs[0].replace_all_uses_with(producer)
    beta_or_zero = torch.zeros_like(mean) if beta is None else beta
    return {producer.name: Statistics(factor.float(), beta_or_zero.float(), mean.float(), variance.float())}


def bias_path(module: GraphModule, producer: Node, weight: str) -> str:
    """Return the path beside the weight, or another one where that holds a value that other nodes read."""
    path = weight.removesuffix("weight") + "bias"
    holders = [node for node in module.graph.nodes if node.op == "get_attr" and node.target == path]
    taken = any(user is not producer for holder in holders for user in holder.users)
    return f"{weight}_folded_bias" if taken else path
