"""GPTQ against nearest rounding, against every rounding there is, and on inputs that degenerate."""

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
from fxquant.passes.rounding import ROUNDERS, RoundingTask
from fxquant.passes.rounding.closed_form import Moments, gptq_rows, on_grid, squared_error, to_rows
from tests.passes.rounding.tasks import correlated, task_of

gptq = ROUNDERS["gptq"]


def grid(weight: Tensor, bits: int) -> Grid:
    return Grid.of_weight(weight, bits)


def nearest(weight: Tensor, of: Grid) -> Tensor:
    return of.round_trip(weight)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(inputs: int, seed: int = 0, groups: int = 1) -> Moments:
    x = correlated(inputs, 200, seed, groups)
    gram = x.transpose(1, 2) @ x
    return Moments(gram, gram)


def errors(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:
    return squared_error(to_rows(weight.double() - rounded.double(), len(gram)), gram)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("ordered", [True, False])
def test_the_output_error_falls_below_nearest_rounding(bits: int, groups: int, ordered: bool) -> None:
    weight, seen = seeded(12, 40), moments(40, groups=groups)
    of = grid(weight, bits)
    found = on_grid(weight, of, groups, gptq_rows(seen, ordered=ordered))
    ours, theirs = (errors(weight, rounded, seen.gram) for rounded in (found, nearest(weight, of)))
    assert (ours <= theirs * (1 + 1e-9)).all()
    assert float(ours.sum()) < 0.6 * float(theirs.sum())
    assert torch.equal(nearest(found, of), found)


def test_uncorrelated_inputs_leave_nearest_rounding() -> None:
    weight, of = seeded(5, 9), grid(seeded(5, 9), 3)
    gram = torch.diag_embed(torch.arange(1.0, 10.0, dtype=torch.float64)).unsqueeze(0)
    assert torch.equal(on_grid(weight, of, 1, gptq_rows(Moments(gram, gram))), nearest(weight, of))


@pytest.mark.parametrize("seed", range(5))
def test_no_rounding_is_better_than_the_best_of_all(seed: int) -> None:
    weight, seen = seeded(4, 5, seed=seed), moments(5, seed)
    of = grid(weight, 2)
    found = on_grid(weight, of, 1, gptq_rows(seen))
    every = torch.tensor(list(product(range(of.spec.qmin, of.spec.qmax + 1), repeat=5)))
    for row in range(4):
        values = (every * of.scale[row]).double()
        least = squared_error((weight[row].double() - values).unsqueeze(0), seen.gram).min()
        ours = errors(weight, found, seen.gram)[0, row]
        plain = errors(weight, nearest(weight, of), seen.gram)[0, row]
        assert least * (1 - 1e-9) <= ours <= plain * (1 + 1e-9)
        assert set((found[row] / of.scale[row]).round().int().tolist()) <= set(range(-2, 2))


def test_blocks_change_speed_only() -> None:
    weight, seen = seeded(6, 30), moments(30)
    of = grid(weight, 3)
    one, many = (on_grid(weight, of, 1, gptq_rows(seen, block=block)) for block in (1000, 7))
    assert torch.equal(one, many)


def direct(weight: Tensor, of: Grid, gram: Tensor, damping: float) -> Tensor:
    """Return optimal brain quantization in the weight's own order, the inverse of what is left taken anew each time."""
    left, chosen = weight.double().clone(), torch.zeros_like(weight)
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(damped[j:, j:])
        column = left[:, j].float()
        chosen[:, j] = of.round_trip(column.unsqueeze(1)).squeeze(1)
        left[:, j:] -= ((left[:, j] - chosen[:, j]) / inverse[0, 0]).unsqueeze(1) * inverse[0]
    return chosen


def test_it_is_optimal_brain_quantization_column_by_column() -> None:
    weight, seen = seeded(8, 12), moments(12)
    of = grid(weight, 3)
    found = on_grid(weight, of, 1, gptq_rows(seen, damping=0.01, ordered=False))
    wanted = direct(weight, of, seen.gram[0], 0.01)
    better = errors(weight, wanted, seen.gram)[0] < errors(weight, nearest(weight, of), seen.gram)[0]
    assert better.sum() >= 6
    assert torch.allclose(found[better], wanted[better])


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    weight, seen = seeded(4, 8), moments(8)
    alive = torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 1], dtype=torch.float64)
    gram = seen.gram * alive[:, None] * alive[None, :]
    of = grid(weight, 3)
    found = on_grid(weight, of, 1, gptq_rows(Moments(gram, gram)))
    assert torch.equal(found[:, alive == 0], nearest(weight, of)[:, alive == 0])
    assert not torch.equal(found, nearest(weight, of))
    nothing = torch.zeros_like(gram)
    assert torch.equal(on_grid(weight, of, 1, gptq_rows(Moments(nothing, nothing))), nearest(weight, of))


def test_a_singular_gram_is_damped_until_it_can_be_factored() -> None:
    weight = seeded(4, 6)
    x = seeded(2, 6).double()
    gram = (x.T @ x).unsqueeze(0)
    of = grid(weight, 3)
    found = on_grid(weight, of, 1, gptq_rows(Moments(gram, gram), damping=1e-16))
    assert torch.isfinite(found).all()
    assert (errors(weight, found, gram) <= errors(weight, nearest(weight, of), gram) * (1 + 1e-9)).all()


def test_moments_that_are_not_finite_are_refused() -> None:
    gram = torch.full((1, 3, 3), torch.nan, dtype=torch.float64)
    with pytest.raises(FailureError, match="not finite"):
        gptq_rows(Moments(gram, gram))


def test_the_registered_algorithm_lowers_the_networks_loss() -> None:
    def loss(task: RoundingTask, method: str) -> float:
        done = ROUNDERS[method](task)
        simulated = simulate(done, task.program[BitAllocation]).module
        answer = model_outputs(simulated, task.images.inputs)
        return float((answer - model_outputs(task.program.module, task.images.inputs)).square().mean())

    task = task_of("plain", 4, 2)
    assert ROUNDERS["gptq"] is gptq
    assert loss(task, "gptq") < 0.7 * loss(task, "nearest")
