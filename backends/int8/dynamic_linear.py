"""Linear layers on int8 weights with activations scaled as they come: what can be done without calibration data."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.backends.int8 import kernels
from fxquant.core.ir import constant, erase_dead, finish, fork, rule_of, set_module

_LARGEST = 127
_SHIFT = 128
"""Kernels take uint8 on the left; symmetric int8 is shifted there and the sum of the weights taken off again."""


class DynamicLinear(nn.Module):
    """A linear layer: float in and out, each row of the input on its own symmetric 8-bit grid.

    `y = (q - 128) W' s_x s_w + b` with `s_x = max |x| / 127` of the row, so an image's answer does not depend on those
    beside it.

    Args:
        weight: float `(N, K)`.
        bias: float `(N,)` or None.
    """

    weight: Tensor
    scales: Tensor
    offsets: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scales = weight.float().abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
        whole = torch.round(weight.float() / scales[:, None]).clamp(-_LARGEST, _LARGEST).to(torch.int8)
        self.register_buffer("weight", whole)
        self.register_buffer("scales", scales)
        self.register_buffer("offsets", _SHIFT * whole.sum(dim=1, dtype=torch.int64).float())
        self.register_buffer("bias", bias)
        self.exact = not kernels.matmul_kernel_is_exact()

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of x `(..., K)` as float `(..., N)`."""
        rows = x.reshape(-1, x.shape[-1]).float()
        step = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
        whole = (torch.round(rows / step).clamp(-_LARGEST, _LARGEST) + _SHIFT).to(torch.uint8)
        sums = kernels.matmul(whole, self.weight, self.exact).float() - self.offsets
        y = sums * step * self.scales
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], y.shape[-1]).to(x.dtype)


def lower_dynamic(module: GraphModule) -> tuple[GraphModule, list[str]]:
    """Return a float ATen graph with its linear layers replaced, and the names of those nodes.

    Args:
        module: it is not changed; layers whose weight is computed stay as they are.
    """
    made, done = fork(module), []
    for node in list(made.graph.nodes):
        rule = rule_of(node)
        weight = constant(module, node.args[rule.weight]) if rule is not None and rule.weight is not None else None
        given = node.args[2] if len(node.args) > 2 else None
        bias = constant(module, given)
        # Among weighted ops only a linear layer has a matrix for its weight.
        if weight is None or weight.dim() != 2 or (given is not None and bias is None):
            continue
        set_module(made, f"dynamic.{node.name}", DynamicLinear(weight, bias))
        with made.graph.inserting_before(node):
            call = made.graph.call_module(f"dynamic.{node.name}", (node.args[0],))
        node.replace_all_uses_with(call)
        done.append(node.name)
    erase_dead(made)
    return finish(made).eval(), done
