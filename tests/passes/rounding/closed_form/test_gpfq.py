"""GPFQ from moments against its definition with stored samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.core.ir import Grid
from fxquant.passes.rounding.closed_form import Moments, gpfq_rows, on_grid
from tests.passes.rounding.tasks import correlated


def definition(weight: Tensor, floats: Tensor, ours: Tensor, grid: Grid) -> Tensor:
    """Return `q_t = Q(<x_t, u> / |x_t|^2)` with `u += w_t f_t` before it and `u -= q_t x_t` behind it, row by row."""
    rounded = torch.zeros_like(weight)
    for row in range(len(weight)):
        u = torch.zeros(len(ours), dtype=torch.float64)
        own = Grid(grid.spec, grid.scale[row : row + 1].double(), grid.zero_point[row : row + 1])
        for t in range(weight.shape[1]):
            u = u + weight[row, t].double() * floats[:, t]
            energy = ours[:, t] @ ours[:, t]
            target = (ours[:, t] @ u) / energy if energy > 0 else weight[row, t].double()
            q = own.round_trip(target.reshape(1, 1))
            rounded[row, t] = float(q)
            u = u - float(q) * ours[:, t]
    return rounded


def pair(inputs: int, seed: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Return float inputs and what a quantized network makes of them, (groups, samples, inputs)."""
    floats = correlated(inputs, 150, seed, groups)
    noise = torch.randn(floats.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return floats, floats + 0.1 * noise


def grid_of(weight: Tensor, bits: int) -> Grid:
    return Grid.of_weight(weight, bits)


def moments(floats: Tensor, ours: Tensor) -> Moments:
    return Moments(ours.transpose(1, 2) @ ours, ours.transpose(1, 2) @ floats)


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2])
def test_moments_give_what_stored_samples_give(bits: int, groups: int) -> None:
    weight, (floats, ours) = seeded(6, 14), pair(14, 3, groups)
    grid = grid_of(weight, bits)
    found = on_grid(weight, grid, groups, gpfq_rows(moments(floats, ours)))
    size = 6 // groups
    for group in range(groups):
        rows = slice(group * size, (group + 1) * size)
        part = Grid(grid.spec, grid.scale[rows], grid.zero_point[rows])
        wanted = definition(weight[rows], floats[group], ours[group], part)
        assert torch.allclose(found[rows], wanted, atol=1e-6)


def test_the_float_networks_output_is_followed_better_than_by_nearest_rounding() -> None:
    weight, (floats, ours) = seeded(16, 64), pair(64, 5)
    grid = grid_of(weight, 3)
    found = on_grid(weight, grid, 1, gpfq_rows(moments(floats, ours)))
    plain = grid.round_trip(weight)
    wanted = floats[0] @ weight.double().T
    ours_error, theirs = (float((wanted - ours[0] @ q.double().T).square().sum()) for q in (found, plain))
    assert ours_error < 0.6 * theirs
    assert torch.equal(grid.round_trip(found), found)


def test_orthogonal_inputs_without_error_leave_nearest_rounding() -> None:
    weight = seeded(5, 8)
    grid = grid_of(weight, 3)
    gram = torch.diag_embed(torch.arange(1.0, 9.0, dtype=torch.float64)).unsqueeze(0)
    plain = grid.round_trip(weight)
    assert torch.equal(on_grid(weight, grid, 1, gpfq_rows(Moments(gram, gram))), plain)


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    weight, (floats, ours) = seeded(4, 8), pair(8, 1)
    ours[..., 2] = 0.0
    grid = grid_of(weight, 3)
    plain = grid.round_trip(weight)
    found = on_grid(weight, grid, 1, gpfq_rows(moments(floats, ours)))
    assert torch.equal(found[:, 2], plain[:, 2])
    assert torch.equal(on_grid(weight, grid, 1, gpfq_rows(moments(floats, torch.zeros_like(ours)))), plain)
