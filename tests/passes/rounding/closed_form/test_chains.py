"""Which neighbours can be scaled, which channels meet which weights, and why others cannot."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.capture import capture
from fxquant.core.ir import Program
from fxquant.core.run import CalibrationSet
from fxquant.passes import Canonicalize, FoldBatchnorm
from fxquant.passes.rounding.closed_form import ScaleChain, scale_chains
from tests.models import MODELS
from tests.programs import folded


class ChainNet(nn.Module):
    """Plain, depthwise, grouped and linear layers behind pooling, padding and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 4, 3, groups=2)
        self.first = nn.Linear(16, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(torch.relu(self.stem(x)), (1, 1, 1, 1))
        x = F.max_pool2d(torch.relu(self.depthwise(x)), 2)
        x = F.avg_pool2d(torch.relu(self.grouped(x)), 2)
        y: Tensor = self.second(torch.relu(self.first(torch.flatten(x, 1))))
        return y


REFUSED = {
    "relu6": "clips at a fixed value",
    "clamp": "clips at a fixed value",
    "gelu": "is not the same up to a factor",
    "sum": "adds another value",
    "ones": "is not the same up to a factor",
    "answer": "is an answer of the network",
    "readers": "has 2 readers",
    "mix": "do not stay apart",
}
"""What lies between two convolutions -> why they cannot be scaled."""


class Between(nn.Module):
    """For each refusal a pair of convolutions with that between them."""

    def __init__(self) -> None:
        super().__init__()
        self.ones = nn.ModuleDict({kind: nn.Conv2d(3, 4, 3, padding=1) for kind in REFUSED})
        self.twos = nn.ModuleDict({kind: nn.Conv2d(2 if kind == "mix" else 4, 4, 3, padding=1) for kind in REFUSED})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = {kind: one(x) for kind, one in self.ones.items()}
        mixed = F.max_pool2d(h["mix"].flatten(2).transpose(1, 2), (1, 2)).transpose(1, 2).reshape(-1, 2, 8, 8)
        answer, read = torch.relu(h["answer"]), torch.relu(h["readers"])
        between = {
            "relu6": F.relu6(h["relu6"]),
            "clamp": h["clamp"].clamp(0.0, 3.0),
            "gelu": F.gelu(h["gelu"]),
            "sum": h["sum"] + x.mean(dim=1, keepdim=True),
            "ones": F.pad(h["ones"], (1, 1, 1, 1), value=1.0),
            "readers": read,
            "mix": mixed,
        }
        return answer, read.mean(dim=(2, 3)), *(self.twos[kind](value) for kind, value in between.items())


def canonical(model: nn.Module, *shape: int) -> tuple[Program, CalibrationSet]:
    torch.manual_seed(0)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    return FoldBatchnorm()(Canonicalize()(capture(model.eval(), (x[:2],)))), CalibrationSet((x,))


def chains_of(model: nn.Module, *shape: int) -> tuple[list[ScaleChain], dict[str, str]]:
    return scale_chains(*canonical(model, *shape))


def test_every_neighbour_of_a_chain_is_found_and_every_weight_knows_the_channel_it_meets() -> None:
    torch.manual_seed(0)
    chains, refusals = chains_of(ChainNet(), 3, 12, 12)
    pairs = [(chain.first, chain.second) for chain in chains]
    assert pairs == [("conv2d", "conv2d_1"), ("conv2d_1", "conv2d_2"), ("conv2d_2", "linear"), ("linear", "linear_1")]
    assert refusals == {"linear_1": "value 'linear_1' is an answer of the network"}
    assert chains[0].between == ("conv2d", "relu", "pad")
    depthwise, grouped, flat, linear = chains
    assert torch.equal(depthwise.channels[:, 0, 0, 0], torch.arange(8))
    # Outputs 0 and 1 of the grouped convolution read inputs 0..3, the others 4..7.
    assert torch.equal(grouped.channels[:, :, 1, 1], torch.arange(8).reshape(2, 1, 4).expand(2, 2, 4).reshape(4, 4))
    # Each of the 4 maps flattens to 2 x 2 features.
    assert torch.equal(flat.channels, torch.arange(4).repeat_interleave(4).expand(6, 16))
    assert torch.equal(linear.channels, torch.arange(6).expand(3, 6))


def test_what_scaling_would_change_is_refused() -> None:
    chains, refusals = chains_of(Between(), 3, 8, 8)
    assert not chains
    for index, (kind, why) in enumerate(REFUSED.items()):
        assert why in refusals[f"conv2d_{index}" if index else "conv2d"], kind


@pytest.mark.parametrize("name", ["shared", "residual", "attention", "concat", "bias_elsewhere", "functional"])
def test_every_weighted_op_begins_a_chain_or_says_why_not(name: str) -> None:
    program = folded(name)
    chains, refusals = scale_chains(program, CalibrationSet(MODELS[name].inputs(2)))
    weighted = {n.name for n in program.module.graph.nodes if n.name.startswith(("conv2d", "linear"))}
    assert {chain.first for chain in chains} | set(refusals) == weighted
    assert not {chain.first for chain in chains} & set(refusals)
    assert all(refusals.values())
    assert name != "shared" or "are shared" in refusals["conv2d"]
