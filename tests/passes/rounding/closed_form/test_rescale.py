"""Scales searched under the output error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxquant.core.facts import Rounding, WeightGrids
from fxquant.core.ir import Grid, RowGrid, WeightFormat, weight_spec
from fxquant.passes.formats import RATIOS, RowProblem, RowRounder, rows_of, squared_error
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.rounding.closed_form import Moments, gptq_rows, with_best_scales
from tests.passes.rounding.tasks import correlated, on_grid, task_of


def best_scales(weight: Tensor, grid: Grid, gram: Tensor, rounder: RowRounder) -> Grid:
    problem = RowProblem(rows_of(weight, groups=len(gram)), gram, rounder)
    return with_best_scales(problem, RowGrid.of(grid, len(gram), len(weight)), WeightFormat(2))[0].grid()


@pytest.mark.parametrize("groups", [1, 3])
def test_no_row_is_worse_than_on_its_own_grid_and_some_are_better(groups: int) -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(2))
    grid = Grid.of_weight(weight, 2)
    x = correlated(20, 100, 1, groups)
    gram = x.transpose(1, 2) @ x
    rounder = gptq_rows(Moments(gram, gram))
    found = best_scales(weight, grid, gram, rounder)
    ours, theirs = (
        squared_error(rows_of(weight.double() - on_grid(weight, g, groups, rounder).double(), groups=groups), gram)
        for g in (found, grid)
    )
    assert (ours <= theirs * (1 + 1e-6)).all()
    assert float(ours.sum()) < 0.9 * float(theirs.sum())
    assert found.spec == grid.spec
    ratio = found.scale / grid.scale
    assert all(min(abs(r - float(one)) for r in RATIOS) < 1e-5 for one in ratio)
    # Each channel is its own: another order of channels finds the same scales.
    if groups == 1:
        turned = replace(grid, scale=grid.scale.flip(0))
        assert torch.equal(best_scales(weight.flip(0), turned, gram, rounder).scale, found.scale.flip(0))


def test_a_channel_whose_own_scale_is_best_keeps_it() -> None:
    spec = weight_spec(4)
    grid = Grid(spec, torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int32))
    weight = torch.tensor([[0.5, -4.0, 3.5], [1.0, -1.5, 0.0]])
    gram = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    assert torch.equal(best_scales(weight, grid, gram, gptq_rows(Moments(gram, gram))).scale, grid.scale)


def test_the_registered_algorithm_hands_its_grids_on() -> None:
    task = task_of("plain", 2, 4)
    found = ROUNDERS["gptq_rescaled"](task)[Rounding]
    assert set(found.grids) == {site.name for site in task.sites}
    owns = [(site, task.rounding.grid_of(site.name, task.program[WeightGrids])) for site in task.sites]
    for site, own in owns:
        assert found.grids[site.name].spec == own.spec
        integers = found.weights[site.name] / found.grids[site.name].scale.reshape(
            -1, *[1] * (found.weights[site.name].dim() - 1)
        )
        assert torch.allclose(integers, integers.round(), atol=1e-4)
    assert any(not torch.equal(found.grids[site.name].scale, own.scale) for site, own in owns)
