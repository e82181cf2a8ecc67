"""SPFQ: right on average, and its definition on stored samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from fxquant.core.facts import Rounding
from fxquant.core.ir import Grid, RowGrid, weight_spec
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.rounding.closed_form import Moments, path_following, spfq_rows, stochastic
from tests.passes.rounding.tasks import correlated, task_of

EVEN = RowGrid(weight_spec(3), torch.full((1, 1, 1), 0.5).double(), torch.zeros(1, 1, 1).double())
UNEVEN = RowGrid.on_levels(torch.full((1, 1, 1), 0.5), torch.tensor([[[-4.0, -1, 0, 3, 3]]]).double())


def draws(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def ones(count: int) -> Tensor:
    return torch.ones(1, 1, count, dtype=torch.float64)


@pytest.mark.parametrize("grid", [EVEN, UNEVEN])
@pytest.mark.parametrize("x", [-1.9, -0.61, 0.0, 0.2, 0.5, 1.3])
def test_the_mean_of_many_draws_is_the_value(grid: RowGrid, x: float) -> None:
    rounded = grid.value(stochastic(x * ones(20_000), grid, torch.rand(1, 1, 20_000, generator=draws()).double()))
    assert len(set(rounded.flatten().tolist())) <= 2
    assert float(rounded.mean()) == pytest.approx(x, abs=4 * float(rounded.std()) / 20_000**0.5 + 1e-12)


@given(x=st.floats(-3, 3), uniform=st.floats(0, 1, exclude_max=True), even=st.booleans())
@settings(max_examples=60, deadline=None)
def test_one_of_the_two_neighbours_is_taken(x: float, uniform: float, even: bool) -> None:
    grid = EVEN if even else UNEVEN
    every = grid.integers()[0, 0] * 0.5
    found = float(grid.value(stochastic(x * ones(1), grid, uniform * ones(1))))
    below, above = every[every <= x], every[every >= x]
    wanted = {float(side) for side in (*below[-1:], *above[:1])}
    # Beyond an end of the grid there is one neighbour.
    assert found in wanted


def pair(inputs: int) -> tuple[Tensor, Tensor]:
    floats = correlated(inputs, 150, 3)[0]
    return floats, floats + 0.1 * torch.randn(floats.shape, generator=draws(3)).double()


def test_from_moments_it_is_its_definition_on_stored_samples() -> None:
    floats, ours = pair(14)
    weight = torch.randn(1, 6, 14, generator=draws(9)).double()
    grid = RowGrid.of(Grid.of_weight(weight[0].float(), 3), 1, 6)
    stream = draws(1)
    uniform = [torch.rand(1, 6, 1, generator=stream, dtype=torch.float64) for _ in range(14)]
    found = spfq_rows(Moments((ours.T @ ours)[None], (ours.T @ floats)[None]), draws(1))(weight, grid)
    u = torch.zeros(len(ours), 6, dtype=torch.float64)
    for t in range(14):
        u += torch.outer(floats[:, t], weight[0, :, t])
        target = (ours[:, t] @ u / (ours[:, t] @ ours[:, t])).reshape(1, 6, 1)
        q = stochastic(target, grid, uniform[t])
        assert torch.equal(found[:, :, t : t + 1], q)
        u -= torch.outer(ours[:, t], grid.value(q).flatten())


def test_every_weights_mean_is_the_target_of_the_path_up_to_it() -> None:
    floats, ours = pair(5)
    moments = Moments((ours.T @ ours)[None], (ours.T @ floats)[None])
    count = 20_000
    row = torch.tensor([0.3, -0.2, 0.1, -0.15, 0.25]).double()
    grid = RowGrid(weight_spec(8), torch.full((1, count, 1), 0.1).double(), torch.zeros(1, count, 1).double())
    targets: list[Tensor] = []
    rounded: list[Tensor] = []
    stream = draws(2)

    def watched(target: Tensor, own: RowGrid) -> Tensor:
        q = stochastic(target, own, torch.rand(target.shape, generator=stream, dtype=torch.float64))
        targets.append(target)
        rounded.append(own.value(q))
        return q

    _ = path_following(moments, watched)(row.expand(1, count, 5), grid)
    for target, value in zip(targets, rounded, strict=True):
        error = value - target
        assert abs(float(error.mean())) < 4 * float(error.std()) / count**0.5
        assert float(error.abs().max()) < 0.1
    # Later targets depend on earlier draws.
    assert float(targets[0].std()) < 1e-12
    assert float(targets[-1].std()) > 0.01


def test_uncorrelated_inputs_are_rounded_right_on_average() -> None:
    gram = torch.diag_embed(torch.arange(1.0, 10.0, dtype=torch.float64)).unsqueeze(0)
    row, count = 0.8 * torch.randn(9, generator=draws(4)).clamp(-1, 1).double(), 20_000
    scale = torch.full((1, count, 1), 0.3).double()
    grid = RowGrid(weight_spec(4), scale, torch.zeros_like(scale))
    found = grid.value(spfq_rows(Moments(gram, gram), draws())(row.expand(1, count, 9), grid))[0]
    assert ((found.mean(dim=0) - row).abs() < 4 * found.std(dim=0) / count**0.5 + 1e-12).all()


def test_the_seed_decides() -> None:
    task = task_of("plain", 4, 2)
    one, again, other = (ROUNDERS["spfq"](replace(task, seed=seed))[Rounding].weights["conv2"] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
