"""GPTQ and GPFQ against their definitions, against nearest rounding, and on inputs that degenerate."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from fxquant.core.errors import FailureError
from fxquant.core.facts import BitAllocation
from fxquant.core.ir import Grid
from fxquant.core.run import model_outputs
from fxquant.passes import simulate
from fxquant.passes.formats import rows_of, squared_error
from fxquant.passes.rounding import ROUNDERS, RoundingTask
from fxquant.passes.rounding.closed_form import Moments, gpfq_rows, gptq_rows
from tests.passes.rounding.tasks import correlated, on_grid, task_of

METHODS = {"gptq": gptq_rows, "gpfq": gpfq_rows}
either = pytest.mark.parametrize("method", sorted(METHODS))


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(inputs: int, seed: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Return inputs in the float and in a quantized network, (groups, samples, inputs)."""
    floats = correlated(inputs, 150, seed, groups)
    return floats, floats + 0.1 * seeded(*floats.shape, seed=seed).double()


def moments(ours: Tensor, floats: Tensor | None = None) -> Moments:
    transposed = ours.transpose(1, 2)
    return Moments(transposed @ ours, transposed @ (ours if floats is None else floats))


def errors(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:
    return squared_error(rows_of(weight.double() - rounded.double(), groups=len(gram)), gram)


@either
def test_uncorrelated_inputs_leave_nearest_rounding(method: str) -> None:
    weight, grid = seeded(5, 9), Grid.of_weight(seeded(5, 9), 3)
    gram = torch.diag_embed(torch.arange(1.0, 10.0, dtype=torch.float64)).unsqueeze(0)
    assert torch.equal(on_grid(weight, grid, 1, METHODS[method](Moments(gram, gram))), grid.round_trip(weight))


@either
def test_inputs_that_are_always_zero_are_rounded_to_nearest(method: str) -> None:
    weight, (floats, ours) = seeded(4, 8), pair(8, 1)
    grid = Grid.of_weight(weight, 3)
    nearest, dead = grid.round_trip(weight), [2, 4]
    ours[..., dead] = 0.0
    found = on_grid(weight, grid, 1, METHODS[method](moments(ours, floats)))
    assert torch.equal(found[:, dead], nearest[:, dead])
    assert not torch.equal(found, nearest)
    assert torch.equal(on_grid(weight, grid, 1, METHODS[method](moments(torch.zeros_like(ours), floats))), nearest)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_lowers_the_output_error_of_nearest_rounding(bits: int, groups: int, ordered: bool) -> None:
    weight, seen = seeded(12, 40), moments(correlated(40, 200, 0, groups))
    grid = Grid.of_weight(weight, bits)
    found = on_grid(weight, grid, groups, gptq_rows(seen, ordered=ordered))
    ours, theirs = (errors(weight, rounded, seen.gram) for rounded in (found, grid.round_trip(weight)))
    assert (ours <= theirs * (1 + 1e-9)).all()
    assert float(ours.sum()) < 0.6 * float(theirs.sum())
    assert torch.equal(grid.round_trip(found), found)


@pytest.mark.parametrize("seed", range(5))
def test_no_rounding_is_better_than_the_best_of_all(seed: int) -> None:
    weight, seen = seeded(4, 5, seed=seed), moments(correlated(5, 200, seed))
    grid = Grid.of_weight(weight, 2)
    found = on_grid(weight, grid, 1, gptq_rows(seen))
    every = torch.tensor(list(product(range(grid.spec.qmin, grid.spec.qmax + 1), repeat=5)))
    for row in range(4):
        values = (every * grid.scale[row]).double()
        least = squared_error((weight[row].double() - values).unsqueeze(0), seen.gram).min()
        ours, plain = (errors(weight, q, seen.gram)[0, row] for q in (found, grid.round_trip(weight)))
        assert least * (1 - 1e-9) <= ours <= plain * (1 + 1e-9)
        assert set((found[row] / grid.scale[row]).round().int().tolist()) <= set(range(-2, 2))


def test_blocks_change_speed_only() -> None:
    weight, seen = seeded(6, 30), moments(correlated(30, 200, 0))
    grid = Grid.of_weight(weight, 3)
    one, many = (on_grid(weight, grid, 1, gptq_rows(seen, block=block)) for block in (1000, 7))
    assert torch.equal(one, many)


def brain_surgeon(weight: Tensor, grid: Grid, gram: Tensor, damping: float) -> Tensor:
    """Return optimal brain quantization in the weight's own order, with a new inverse for each column."""
    left, chosen = weight.double().clone(), torch.zeros_like(weight)
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(damped[j:, j:])
        chosen[:, j] = grid.round_trip(left[:, j].float().unsqueeze(1)).squeeze(1)
        left[:, j:] -= ((left[:, j] - chosen[:, j]) / inverse[0, 0]).unsqueeze(1) * inverse[0]
    return chosen


def test_gptq_is_optimal_brain_quantization_column_by_column() -> None:
    weight, seen = seeded(8, 12), moments(correlated(12, 200, 0))
    grid = Grid.of_weight(weight, 3)
    found = on_grid(weight, grid, 1, gptq_rows(seen, damping=0.01, ordered=False))
    wanted = brain_surgeon(weight, grid, seen.gram[0], 0.01)
    better = errors(weight, wanted, seen.gram)[0] < errors(weight, grid.round_trip(weight), seen.gram)[0]
    assert better.sum() >= 6
    assert torch.allclose(found[better], wanted[better])


def test_a_singular_gram_is_damped_until_it_can_be_factored() -> None:
    weight, seen = seeded(4, 6), moments(seeded(1, 2, 6).double())
    grid = Grid.of_weight(weight, 3)
    found = on_grid(weight, grid, 1, gptq_rows(seen, damping=1e-16))
    assert torch.isfinite(found).all()
    ours, theirs = (errors(weight, rounded, seen.gram) for rounded in (found, grid.round_trip(weight)))
    assert (ours <= theirs * (1 + 1e-9)).all()


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FailureError, match="not finite"):
        gptq_rows(moments(torch.full((1, 3, 3), torch.nan, dtype=torch.float64)))


def followed(weight: Tensor, floats: Tensor, ours: Tensor, grid: Grid) -> Tensor:
    """Return `q_t = Q(<x_t, u> / |x_t|^2)` with `u += w_t f_t` before it and `u -= q_t x_t` after it, row by row."""
    rounded = torch.zeros_like(weight)
    for row in range(len(weight)):
        u = torch.zeros(len(ours), dtype=torch.float64)
        own = Grid(grid.spec, grid.scale[row : row + 1].double(), grid.zero_point[row : row + 1])
        for t in range(weight.shape[1]):
            u = u + weight[row, t].double() * floats[:, t]
            target = (ours[:, t] @ u) / (ours[:, t] @ ours[:, t])
            rounded[row, t] = q = float(own.round_trip(target.reshape(1, 1)))
            u = u - q * ours[:, t]
    return rounded


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2])
def test_gpfq_from_moments_is_its_definition_on_stored_samples(bits: int, groups: int) -> None:
    weight, (floats, ours) = seeded(6, 14, seed=9), pair(14, 3, groups)
    grid = Grid.of_weight(weight, bits)
    found = on_grid(weight, grid, groups, gpfq_rows(moments(ours, floats)))
    for group, rows in enumerate(torch.arange(6).chunk(groups)):
        part = Grid(grid.spec, grid.scale[rows], grid.zero_point[rows])
        assert torch.allclose(found[rows], followed(weight[rows], floats[group], ours[group], part), atol=1e-6)


def test_gpfq_follows_the_float_networks_output_better_than_nearest_rounding() -> None:
    weight, (floats, ours) = seeded(16, 64, seed=9), pair(64, 5)
    grid = Grid.of_weight(weight, 3)
    found = on_grid(weight, grid, 1, gpfq_rows(moments(ours, floats)))
    wanted = floats[0] @ weight.double().T
    error, plain = (float((wanted - ours[0] @ q.double().T).square().sum()) for q in (found, grid.round_trip(weight)))
    assert error < 0.6 * plain
    assert torch.equal(grid.round_trip(found), found)


def test_the_registered_algorithm_lowers_the_networks_loss() -> None:
    def loss(task: RoundingTask, method: str) -> float:
        simulated = simulate(ROUNDERS[method](task), task.program[BitAllocation]).module
        answer = model_outputs(simulated, task.images.inputs)
        return float((answer - model_outputs(task.program.module, task.images.inputs)).square().mean())

    task = task_of("plain", 4, 2)
    assert loss(task, "gptq") < 0.7 * loss(task, "nearest")
