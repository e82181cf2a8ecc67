"""Recipes that allocate exactly: the plan is the best of all plans, tried one by one on eight layers."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.core.ir import WeightFormat
from fxquant.recipes import RECIPES
from fxquant.result import Result

EXACT = [
    name
    for name, each in RECIPES.items()
    # Weights and activations chosen jointly make 25 choices of a layer (see below); routes are for images.
    if each.allocator in ("linear", "iqp") and len(each.settings.activation_bits) == 1 and not each.settings.routed
]
LAYERS = 8


class Layers(nn.Module):
    """Linear layers of unlike sizes and scales.

    Args:
        count: at most 8.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(4)
        widths = [6, 24, 12, 32, 20, 28, 18, 14, 6][: count + 1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(x)
            x = layer(x) * 2.0
        return x


@cache
def inputs() -> Tensor:
    return torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", EXACT)
def test_the_plan_is_the_best_of_all(name: str) -> None:
    recipe = RECIPES[name]
    widths = sorted(WeightFormat.parse(each).bits for each in recipe.settings.bits or ())
    result = fxquant.quantize(
        Layers(LAYERS).eval(),
        [(inputs(), torch.arange(24) % 3)],
        # Scales and pinned ends take about one bit a weight.
        fxquant.Budget(average_bits=1.0 + 0.6 * widths[0] + 0.4 * widths[-1]),
        recipe=name,
        target="reference",
        rounding="nearest" if "rounding" not in recipe.essence else None,
        progress=False,
        options={"curve": 0},
    )
    check_best(result, LAYERS)


@pytest.mark.parametrize("budget", ["average_bits=4", "bops=8000", "average_bits=4,bops=6000"])
def test_weights_and_activations_chosen_jointly_are_the_best_of_all(budget: str) -> None:
    result = fxquant.quantize(
        Layers(3).eval(),
        inputs(),
        budget,
        recipe="limpq",
        target="reference",
        progress=False,
        options={"curve": 0},
    )
    check_best(result, 3)
    choices = result.allocation.choices.values()
    if "bops" in budget:
        assert len({choice.activation_bits for choice in choices}) > 1
        assert any(choice.activation_bits != choice.weight_bits for choice in choices)


def check_best(result: Result, layers: int) -> None:
    """Assert that no plan within the limits has a lower score, trying all."""
    matrix = result.sensitivity
    candidates = matrix.candidates
    of: dict[str, list[int]] = {}
    for k, candidate in enumerate(candidates):
        of.setdefault(candidate.site, []).append(k)
    assert len(of) == layers
    plans = np.array(list(itertools.product(*of.values())))
    scores = np.zeros(len(plans))
    for one, other in itertools.product(range(layers), repeat=2):
        scores += matrix.values[plans[:, one], plans[:, other]]
    fits = np.ones(len(plans), dtype=bool)
    for name, limit in result.allocation.limits.items():
        table = result.costs[name]
        fits &= table.constant + table.values[plans].sum(axis=1) <= limit * (1 + 1e-9)
    assert 0 < fits.sum() < len(plans)
    taken = [k for k, c in enumerate(candidates) if result.allocation.choices[c.site] == c.choice]
    assert bool(fits[(plans == taken).all(axis=1)].all())
    best = float(scores[fits].min())
    assert float(matrix.values[np.ix_(taken, taken)].sum()) == pytest.approx(best, rel=1e-6, abs=1e-12)
