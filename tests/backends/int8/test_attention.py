from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxquant.backends.int8 import fuse_attention
from fxquant.capture import capture

FUSED = torch.ops.aten.scaled_dot_product_attention.default
SHAPE = (2, 3, 7, 4)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * 0.3, -1) @ v


def _before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q * 0.2, k.transpose(2, 3)), 3) @ v


def _twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q * 0.5, k.transpose(-1, -2)) * 0.5, -1) @ v


def _other_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(-2, -1)), -2) @ v


def _read_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)), -1)
    return weights @ v + weights.sum()


def _masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1))
    return torch.softmax(scores + torch.eye(7), -1) @ v


class _Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v) + 1.0


@pytest.mark.parametrize(
    ("attend", "fused"),
    [
        (_inside, 1),
        (_before, 1),
        (_twice, 1),
        (nn.functional.scaled_dot_product_attention, 1),
        (_other_axis, 0),
        (_read_twice, 0),
        (_masked, 0),
    ],
)
def test_what_is_attention_is_fused_and_nothing_else(attend: Attend, fused: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(SHAPE, generator=generator) for _ in range(3))
    module = capture(_Attention(attend), inputs).module
    expected = module(*inputs)
    assert fuse_attention(module) == fused
    module.recompile()
    calls = [node for node in module.graph.nodes if node.target is FUSED]
    assert len(calls) == fused
    assert not fused or not [n for n in module.graph.nodes if n.target is torch.ops.aten.softmax.int]
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-5, atol=1e-6)


def test_scores_that_someone_else_reads_stay() -> None:
    class Scores(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            scores = torch.matmul(q, k.transpose(-2, -1)) * 0.5
            return torch.softmax(scores, -1) @ v, scores

    inputs = tuple(torch.randn(SHAPE) for _ in range(3))
    assert fuse_attention(capture(Scores(), inputs).module) == 0
