"""Reconstruction over neighbouring layers lies between layer-wise reconstruction and BRECQ, and ends as they do."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.core.facts import Rounding
from fxquant.core.run import model_outputs
from fxquant.result import Result


class Blocks(nn.Module):
    """Residual blocks of two layers each, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for k in range(0, 6, 2):
            x = x + self.layers[k + 1](torch.relu(self.layers[k](x)))
        return x


@cache
def inputs() -> Tensor:
    return torch.randn(48, 12, generator=torch.Generator().manual_seed(1))


@cache
def made(recipe: str, unit: str) -> Result:
    options = {"iterations": 40, "batch": 16, "rounding_lr": 0.1, "guard": False, "unit": unit}
    return fxquant.quantize(
        Blocks().eval(),
        inputs(),
        "average_bits=3",
        recipe=recipe,
        target="reference",
        progress=False,
        options={"rounding_options": options, "pin_ends": False, "bits": (3,)},
    )


def answers(recipe: str, unit: str) -> Tensor:
    return model_outputs(made(recipe, unit).simulated, (inputs(),))


@pytest.mark.parametrize(("neighbours", "unit", "count"), [("layers:1", "layer", 6), ("layers:2", "block", 3)])
def test_one_layer_is_layer_wise_and_all_of_a_block_is_brecq(neighbours: str, unit: str, count: int) -> None:
    assert torch.equal(answers("uwc", neighbours), answers("brecq", unit))
    assert len(made("uwc", neighbours).program[Rounding].units) == count
    assert not any("rejected" in note for note in made("uwc", neighbours).program[Rounding].notes)


def test_how_many_layers_are_taken_together_matters() -> None:
    found = [answers("uwc", f"layers:{count}") for count in (1, 2, 4)]
    assert all(not torch.equal(one, other) for one, other in pairwise(found))
