"""GPTQ in the space of few patches rounds as GPTQ with the whole matrix does."""

from __future__ import annotations

import pytest
import torch

from fxquant.core.ir import Grid, RowGrid, shape_of
from fxquant.passes.formats import Patches, RowProblem, rows_of, squared_error
from fxquant.passes.rounding.closed_form import GramAccumulator, Moments, geometry_of, gptq_rounder, gptq_rows
from tests.scoring import traced


def seen(groups: int, count: int, size: int) -> Patches:
    x = torch.randn(groups, count, size, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    # Neighbouring inputs resemble each other, one is always zero, and the first are the largest.
    x = (x + x.roll(1, 2)) * torch.linspace(3, 0.5, size)
    x[:, :, 5] = 0
    return Patches(x)


@pytest.mark.parametrize(("groups", "count", "block"), [(1, 7, 128), (1, 30, 8), (3, 11, 16), (2, 1, 5)])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_same_integers_as_with_the_whole_matrix(groups: int, count: int, block: int, bits: int) -> None:
    few = seen(groups, count, 40)
    gram = few.rows.transpose(1, 2) @ few.rows
    weight = torch.randn(groups * 6, 40, generator=torch.Generator().manual_seed(1))
    rows, grid = rows_of(weight, groups=groups), RowGrid.of(Grid.of_weight(weight, bits), groups, len(weight))
    for ordered in (True, False):
        found = gptq_rounder(few, block=block, ordered=ordered)(rows, grid)
        assert torch.equal(found, gptq_rows(Moments(gram, gram), block=block, ordered=ordered)(rows, grid))
    torch.testing.assert_close(squared_error(rows, few), squared_error(rows, gram))
    ours, theirs = (RowProblem(rows, each).importance for each in (few, gram))
    torch.testing.assert_close(ours, theirs)


def test_a_layer_that_saw_nothing_is_rounded_to_nearest() -> None:
    rows = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = RowGrid.of(Grid.of_weight(rows[0].float(), 3), 1, 4)
    found = gptq_rounder(Patches(torch.zeros(1, 2, 12, dtype=torch.float64)))(rows, grid)
    assert torch.equal(found, grid.nearest(rows))


@pytest.mark.parametrize(("images", "few"), [(1, True), (9, False)])
def test_patches_are_kept_while_they_are_few(images: int, few: bool) -> None:
    node = next(n for n in traced("plain").module.graph.nodes if str(n.target) == "aten.conv2d.default")
    x = torch.randn(images, shape_of(node.args[0])[1], 2, 2, generator=torch.Generator().manual_seed(2))
    geometry, counted, whole = geometry_of(node), GramAccumulator(few=True), GramAccumulator()
    for each in torch.split(x, 1):
        counted.add(each, geometry)
        whole.add(each, geometry)
    gram, expected = counted.gram(), whole.moments().gram
    assert isinstance(gram, Patches) == few
    found = gram.rows.transpose(1, 2) @ gram.rows if isinstance(gram, Patches) else gram
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
