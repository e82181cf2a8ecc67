"""The table of sizes against what is really stored: initializers of the ONNX file, tensors of the state dict."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.backends import backend
from fxquant.backends.onnx import to_onnx
from fxquant.capture import capture
from fxquant.core.facts import BitAllocation, CostTables, Target
from fxquant.core.ir import Choice, Program, Sites
from fxquant.passes import Canonicalize, EstimateCost, FoldBatchnorm, InsertFakeQuant
from tests.backends.lowered import calibrated

FORMATS = (2, 3, 4, 5, 8, "1.6c", "2c", "3c", "3p", "2.5r")
PLANS = {
    "2 bits": ["W2A8"],
    "3 bits": ["W3A8"],
    "codebooks": ["W2cA8", "W3cA8"],
    "all kinds": ["W8A8", "W1.6cA8", "W3pA8", "W2.5rA8", "W5A8", "W2cA8", "W4A8"],
}


class Residual(nn.Module):
    """Convolutions of several sizes around a sum, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, padding=1)
        self.one = nn.Conv2d(48, 160, 3, padding=1)
        self.depthwise = nn.Conv2d(160, 160, 3, padding=1, groups=160)
        self.two = nn.Conv2d(160, 48, 3, padding=1)
        self.head = nn.Linear(48, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.two(torch.relu(self.depthwise(torch.relu(self.one(x)))))
        answer: Tensor = self.head(torch.relu(x).mean((2, 3)))
        return answer


@cache
def ready(runner: str) -> Program:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    program = FoldBatchnorm()(Canonicalize()(capture(Residual().eval(), (images[:2],))))
    return calibrated(program, (images,), widths=FORMATS, target=backend(runner).target)


def costed(target: Target) -> Program:
    return EstimateCost(target)(ready(target.runner))


def planned(name: str, target: Target) -> tuple[GraphModule, float]:
    """Return the simulated graph of a plan, and its bytes by the table."""
    program = costed(target)
    labels = PLANS[name]
    choices = {s.name: Choice.parse(labels[k % len(labels)]) for k, s in enumerate(program[Sites].sites)}
    simulated = InsertFakeQuant(8)(program.with_facts(BitAllocation(choices))).module
    return simulated, program[CostTables]["size"].of(choices)


@pytest.mark.parametrize("name", PLANS)
def test_the_initializers_of_the_file_take_what_the_table_says(name: str) -> None:
    module, bytes_ = planned(name, backend("onnxruntime").target)
    stored = sum(len(tensor.raw_data) for tensor in to_onnx(module).graph.initializer)
    # What is more are shapes, and numbers that tables of symbols are made of.
    assert bytes_ == pytest.approx(stored, rel=0.01)


@pytest.mark.parametrize("name", PLANS)
def test_the_tensors_of_the_state_dict_take_what_the_table_says(name: str) -> None:
    found = backend("fx_int8")
    module, bytes_ = planned(name, found.target)
    assert found.lower is not None
    stored = sum(tensor.nbytes for tensor in found.lower(module).state_dict().values())
    constant = costed(found.target)[CostTables]["size"].constant
    # Grids of activations are numbers of the graph.
    assert stored == bytes_ - constant


def test_declared_widths_rule_where_a_file_describes_the_target() -> None:
    own = backend("onnxruntime").target
    described = replace(own, name="npu", runs_on="onnxruntime", storage_bits={b: max(b, 4) for b in own.weight_bits})
    assert (own.packs, described.packs) == (True, False)
    table = costed(described)[CostTables]["size"]
    values = {(c.site, c.choice.label): v for c, v in zip(table.candidates, table.values, strict=True)}
    assert values["one", "W2A8"] == values["one", "W3A8"] == values["one", "W4A8"] == 160 * 48 * 9 / 2 + 8 * 160
    assert values["one", "W5A8"] == 160 * 48 * 9 * 5 / 8 + 8 * 160
