"""Coordinate descent never loses, ends where no single weight can be better, and fits scales by least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.core.ir import Grid, RowGrid, WeightFormat
from fxquant.passes.formats import RowProblem, find, rows_of, squared_error
from fxquant.passes.rounding.closed_form import Moments, gptq_rows, refined, rescaled_to, swept
from tests.passes.rounding.tasks import correlated


def posed(groups: int = 1, kind: str = "uniform") -> tuple[RowProblem, RowGrid, Tensor]:
    """Return a weight of 4 rows in each group, a 2-bit grid, and its integers by GPTQ."""
    weight = torch.randn(4 * groups, 20, generator=torch.Generator().manual_seed(3))
    x = correlated(20, 90, 1, groups)
    gram = x.transpose(1, 2) @ x
    problem = RowProblem(rows_of(weight, groups=groups), gram, gptq_rows(Moments(gram, gram)))
    even = RowGrid.of(Grid.of_weight(weight, 2), groups, len(weight))
    grid = even if kind == "uniform" else find(problem, WeightFormat(2, kind))
    return problem, grid, problem.rounder(problem.rows, grid)


def error(problem: RowProblem, grid: RowGrid, integers: Tensor) -> Tensor:
    assert isinstance(problem.gram, torch.Tensor)
    return squared_error(problem.rows - grid.value(integers), problem.gram)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", ["uniform", "codebook"])
def test_sweeps_lower_the_error_until_no_single_weight_can(groups: int, kind: str) -> None:
    problem, grid, integers = posed(groups, kind)
    start = error(problem, grid, integers)
    for _ in range(20):
        moved = swept(problem, grid, integers)
        assert (error(problem, grid, moved) <= error(problem, grid, integers) * (1 + 1e-12)).all()
        if torch.equal(moved, integers):
            break
        integers = moved
    else:
        pytest.fail("the sweeps do not end")
    least = error(problem, grid, integers)
    assert float(least.sum()) < 0.97 * float(start.sum())
    for level in grid.integers().unbind(dim=2):
        for column in range(20):
            other = integers.clone()
            other[:, :, column] = level
            assert (error(problem, grid, other) >= least * (1 - 1e-9)).all()


def test_blocks_change_speed_only() -> None:
    problem, grid, integers = posed(2)
    assert torch.equal(swept(problem, grid, integers, 1000), swept(problem, grid, integers, 7))


def test_scales_are_those_of_least_squares() -> None:
    problem, grid, integers = posed()
    assert isinstance(problem.gram, torch.Tensor)
    found = rescaled_to(problem, grid, integers)
    root = torch.linalg.cholesky(problem.gram[0]).T
    for row in range(4):
        sides = (root @ integers[0, row]).unsqueeze(1), (root @ problem.rows[0, row]).unsqueeze(1)
        assert torch.allclose(found.scale[0, row], torch.linalg.lstsq(*sides).solution[0], rtol=1e-6)
    empty = torch.zeros_like(integers)
    assert torch.equal(rescaled_to(problem, grid, empty).scale, grid.scale)


def test_refined_rows_are_never_worse_and_stay_on_their_levels() -> None:
    for kind in ("uniform", "codebook"):
        problem, grid, integers = posed(3, kind)
        better, moved = refined(problem, grid, integers)
        assert (error(problem, better, moved) <= error(problem, grid, integers) * (1 + 1e-9)).all()
        assert float(error(problem, better, moved).sum()) < 0.95 * float(error(problem, grid, integers).sum())
        assert torch.equal(better.nearest(better.value(moved)), moved)


def test_a_column_whose_input_is_always_zero_stays() -> None:
    problem, grid, integers = posed()
    assert isinstance(problem.gram, torch.Tensor)
    problem.gram[:, 5] = 0.0
    problem.gram[:, :, 5] = 0.0
    moved = swept(problem, grid, integers)
    assert torch.equal(moved[..., 5], integers[..., 5])
    assert not torch.equal(moved, integers)
