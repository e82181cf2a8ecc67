from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxquant.backends.int8 import fuse_attention
from fxquant.capture import capture
from tests.models import Composed

FUSED = torch.ops.aten.scaled_dot_product_attention.default

ATTENTION: dict[str, Callable[..., Tensor]] = {
    "scaled inside": lambda _, q, k, v: torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * 0.3, -1) @ v + 1.0,
    "scaled before": lambda _, q, k, v: torch.softmax(torch.matmul(q * 0.2, k.transpose(2, 3)), 3) @ v + 1.0,
    "scaled twice": lambda _, q, k, v: torch.softmax(torch.matmul(q * 0.5, k.transpose(-1, -2)) * 0.5, -1) @ v + 1.0,
    "torch's own": lambda _, q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v) + 1.0,
}


def _read_twice(_: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)), -1)
    return weights @ v + weights.sum()


def _scores_read(_: object, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q, k.transpose(-2, -1)) * 0.5
    return torch.softmax(scores, -1) @ v, scores


OTHERS: dict[str, Callable[..., object]] = {
    "other axis": lambda _, q, k, v: torch.softmax(torch.matmul(q, k.transpose(-2, -1)), -2) @ v + 1.0,
    "weights read twice": _read_twice,
    "scores read": _scores_read,
    "masked": lambda _, q, k, v: torch.softmax(torch.matmul(q, k.transpose(-2, -1)) + torch.eye(7), -1) @ v,
}


@pytest.mark.parametrize("name", [*ATTENTION, *OTHERS])
def test_what_is_attention_is_fused_and_nothing_else(name: str) -> None:
    generator, fused = torch.Generator().manual_seed(0), int(name in ATTENTION)
    inputs = tuple(torch.randn(2, 3, 7, 4, generator=generator) for _ in range(3))
    module = capture(Composed({**ATTENTION, **OTHERS}[name]), inputs).module
    expected = module(*inputs)
    assert fuse_attention(module) == fused
    module.recompile()
    assert len([node for node in module.graph.nodes if node.target is FUSED]) == fused
    assert not fused or not [n for n in module.graph.nodes if n.target is torch.ops.aten.softmax.int]
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-5, atol=1e-6)
