"""The contract of every weight format, and each against what it is defined by."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.core.ir import FORMAT_KINDS, RowGrid, WeightFormat
from fxquant.passes.formats import (
    FORMATS,
    RATIOS,
    MeasuredRounder,
    Patches,
    RowProblem,
    cheapest_rows,
    find,
    rows_of,
    squared_error,
)
from fxquant.passes.formats import problem as format_problem
from fxquant.passes.rounding.closed_form import Moments, gptq_rounder, gptq_rows
from tests.passes.rounding.tasks import correlated

EVERY = [
    WeightFormat(bits, kind) for kind, known in FORMAT_KINDS.items() for bits in range(known.least, known.most + 1)
]
EVERY += [
    WeightFormat(2.5, "row-mixed"),
    WeightFormat(4.2, "two-scheme"),
    WeightFormat(1.6, "codebook"),
    WeightFormat(2.4, "codebook"),
]
some = pytest.mark.parametrize("weight", EVERY, ids=lambda weight: weight.label)


def tailed(rows: int, inputs: int, seed: int = 0) -> Tensor:
    """Weights as trained networks have them: many small ones, few large ones, each row of another size."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.rand(rows, 1, generator=draw).double() + 0.1
    return torch.randn(rows, inputs, generator=draw).double() ** 3 * size


def problem(groups: int = 1, ratios: tuple[float, ...] = (1.0,)) -> RowProblem:
    x = correlated(36, 120, 1, groups)
    gram = x.transpose(1, 2) @ x
    return RowProblem(rows_of(tailed(8 * groups, 36), groups=groups), gram, gptq_rows(Moments(gram, gram)), ratios)


def test_both_tables_name_the_same_kinds() -> None:
    assert set(FORMATS) == set(FORMAT_KINDS)


@some
@pytest.mark.parametrize("groups", [1, 2])
def test_every_row_has_int8_levels_as_many_as_its_bits_hold(weight: WeightFormat, groups: int) -> None:
    given_rows = problem(groups)
    grid = find(given_rows, weight)
    levels = grid.integers()
    assert levels.shape[:2] == given_rows.rows.shape[:2]
    assert bool(((levels >= -128) & (levels <= 127) & (levels == levels.round())).all())
    counts = torch.tensor([len(torch.unique(row)) for row in levels.flatten(0, 1)])
    assert counts.double().log2().mean() <= weight.bits + 1e-9
    assert bool((grid.scale > 0).all())
    rounded = given_rows.rounder(given_rows.rows, grid)
    assert bool((rounded.unsqueeze(3) == levels.unsqueeze(2)).any(dim=3).all()), "only levels are used"
    whole = grid.grid()
    assert torch.equal(whole.quantize(whole.dequantize(rounded.flatten(0, 1))), rounded.flatten(0, 1).int())


@some
def test_more_bits_of_a_kind_err_less(weight: WeightFormat) -> None:
    known, given_rows = FORMAT_KINDS[weight.kind], problem()
    wider = WeightFormat(min(known.most, int(weight.bits) + 1), weight.kind)
    if wider != weight:
        assert given_rows.error(find(given_rows, wider)).sum() < given_rows.error(find(given_rows, weight)).sum()


@some
def test_scales_under_the_rounder_err_no_more(weight: WeightFormat) -> None:
    plain, searched = problem(), problem(ratios=RATIOS)
    # Mixed rows spend what they saved on other rows, so only their sum falls.
    assert searched.error(find(searched, weight)).sum() <= plain.error(find(plain, weight)).sum() * (1 + 1e-9)


def test_a_codebook_errs_less_than_even_spacing_on_tailed_weights() -> None:
    given_rows = RowProblem(rows_of(tailed(64, 400)))
    for bits in (2, 3):
        even, book = (given_rows.error(find(given_rows, WeightFormat(bits, kind))) for kind in ("uniform", "codebook"))
        assert book.sum() < 0.75 * even.sum()


def test_a_row_that_lies_on_few_values_is_exact_in_a_codebook() -> None:
    values = torch.tensor([-1.27, -0.2, 0.0, 0.55], dtype=torch.float64)
    rows = values[torch.arange(2000).reshape(4, 500) % 4].unsqueeze(0)
    given_rows = RowProblem(rows)
    assert given_rows.error(find(given_rows, WeightFormat(2, "codebook"))).max() < 1e-9 * rows.square().sum()


def test_powers_of_two_are_powers_of_two() -> None:
    levels = find(problem(), WeightFormat(4, "pow2")).integers()
    magnitudes = torch.unique(levels.abs())
    assert magnitudes.tolist() == [0, 1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("bits", [2.5, 3.25])
def test_rows_of_several_widths_keep_their_average(bits: float) -> None:
    given_rows = RowProblem(rows_of(tailed(40, 64)))
    grid = find(given_rows, WeightFormat(bits, "row-mixed"))
    counts = torch.tensor([float(len(torch.unique(row))) for row in grid.integers()[0]])
    assert len(set(counts.tolist())) > 1
    assert float(counts.log2().ceil().mean()) <= bits
    assert given_rows.error(grid).sum() < given_rows.error(find(given_rows, WeightFormat(int(bits)))).sum()


def test_rows_of_two_schemes_take_what_errs_least_and_a_share_of_them_8_bits() -> None:
    draw = torch.Generator().manual_seed(0)
    # Rows of powers of two, rows of even spacing, and rows of 30 times the size, whose errors weigh most.
    powers = 2.0 ** torch.randint(-6, 1, (10, 64), generator=draw).double()
    powers *= torch.randint(0, 2, (10, 64), generator=draw) * 2.0 - 1
    even = torch.rand(10, 64, generator=draw).double() * 2 - 1
    large = 30 * (torch.rand(5, 64, generator=draw).double() * 2 - 1)
    given_rows = RowProblem(rows_of(torch.cat([powers, even, large])))
    grid = find(given_rows, WeightFormat(4.8, "two-scheme"))
    counts = [len(torch.unique(row)) for row in grid.integers()[0]]
    assert counts == [15] * 10 + [16] * 10 + [256] * 5
    plain = [given_rows.error(find(given_rows, each)) for each in (WeightFormat(4), WeightFormat(4, "pow2"))]
    found = given_rows.error(find(given_rows, WeightFormat(4, "two-scheme")))
    assert torch.equal(found, torch.minimum(*plain))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 1.0))
def test_the_price_finds_what_trying_everything_finds_up_to_one_row(seed: int, share: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    costs = torch.tensor([2.0, 3.0, 5.0]).double().expand(5, 3)
    errors = torch.rand(5, 3, generator=draw).double().sort(dim=1, descending=True).values
    limit = 10.0 + share * 15.0
    picked = cheapest_rows(errors, costs, limit)
    at = torch.arange(5)
    assert float(costs[at, picked].sum()) <= limit
    best = min(
        sum(float(errors[r, k]) for r, k in enumerate(plan))
        for plan in product(range(3), repeat=5)
        if sum(float(costs[r, k]) for r, k in enumerate(plan)) <= limit
    )
    found = float(errors[at, picked].sum())
    assert best - 1e-9 <= found <= best + float((errors[:, 0] - errors[:, 2]).max()) + 1e-9


def test_mixed_grids_keep_each_rows_own() -> None:
    given_rows = problem()
    one, two = find(given_rows, WeightFormat(3)), find(given_rows, WeightFormat(2, "codebook"))
    picked = torch.arange(8).reshape(1, 8) % 2 == 0
    mixed: RowGrid = one.chosen(two, picked)
    values = given_rows.rows
    for row in range(8):
        expected = (two if picked[0, row] else one).nearest(values)[0, row]
        assert torch.equal(mixed.nearest(values)[0, row], expected)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("label", ["2c", "4"])
def test_a_rounder_knows_the_error_of_what_it_found(groups: int, few: bool, label: str) -> None:
    x = torch.randn(groups, 12 if few else 200, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gram = x.transpose(1, 2) @ x
    seen = RowProblem(rows_of(tailed(8 * groups, 36), groups=groups), gram, gptq_rounder(Patches(x) if few else gram))
    grid = find(seen, WeightFormat.parse(label))
    found = seen.rounded(grid)
    assert torch.equal(found, seen.rounder(seen.rows, grid))
    # Errors are taken in float32.
    torch.testing.assert_close(
        seen.error(grid), squared_error(seen.rows - grid.value(found), gram), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("label", ["1c", "1.6c", "2c", "3c"])
def test_some_rows_of_a_large_weight_decide_how_all_are_rounded(
    groups: int, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = correlated(36, 120, 1, groups)
    gram, weight = x.transpose(1, 2) @ x, WeightFormat.parse(label)
    draw = torch.Generator().manual_seed(0)
    rows = rows_of(torch.randn(128 * groups, 36, generator=draw), groups=groups)
    rounder, seen = gptq_rounder(gram), list[int]()
    whole = RowProblem(rows, gram, rounder)
    expected = whole.error(find(whole, weight)).sum()

    def counted(rows: Tensor, grid: RowGrid) -> tuple[Tensor, Tensor]:
        seen.append(rows.shape[1])
        return rounder.outcome(rows, grid)

    for name, value in {"LARGE": 1, "SAMPLED": 32, "TOGETHER": 16}.items():
        monkeypatch.setattr(format_problem, name, value)
    large = RowProblem(rows, gram, MeasuredRounder(counted))
    found = find(large, weight)
    assert large.some_rows().rows.shape[1] == 32
    # Of the two kinds that were rounded on 32 rows, one is left, or both where rows take either.
    error = large.error(found)
    assert 1 <= seen.count(128) <= 2
    assert float(error.sum()) <= 1.1 * float(expected)
    assert torch.equal(error, large.error(found))


def test_rows_of_a_large_weight_are_guarded_where_one_of_the_sample_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated(36, 120, 1, 1)
    gram = x.transpose(1, 2) @ x
    rows = rows_of(tailed(64, 36))
    grid = find(RowProblem(rows), WeightFormat(4))
    # A grid that clips: its nearest values are hard to beat.
    tight = replace(grid, scale=grid.scale / 6)
    plain = squared_error(rows - tight.value(tight.nearest(rows)), gram)
    for name, value in {"LARGE": 1, "SAMPLED": 16, "TOGETHER": 4}.items():
        monkeypatch.setattr(format_problem, name, value)
    integers, error = gptq_rounder(gram).outcome(rows, tight)
    assert (error <= plain * (1 + 1e-5)).all()
    torch.testing.assert_close(squared_error(rows - tight.value(integers), gram), error, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("label", ["2c", "4"])
def test_scales_are_the_same_however_many_rows_are_rounded_in_one_run(
    groups: int, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = find(problem(groups), WeightFormat.parse(label))
    whole = problem(groups, RATIOS).rescaled(grid)
    monkeypatch.setattr(format_problem, "STACKED", 3 * 36 * groups * len(RATIOS))
    seen = problem(groups, RATIOS)
    pieces = seen.rescaled(grid)
    assert torch.equal(pieces.scale, whole.scale)
    assert not torch.equal(whole.scale, grid.scale)
    assert torch.equal(seen.rounded(pieces), problem(groups).rounded(whole))


def test_a_problem_rounds_on_each_grid_once() -> None:
    plain = problem()
    calls: list[RowGrid] = []

    def counted(rows: Tensor, grid: RowGrid) -> Tensor:
        calls.append(grid)
        return plain.rounder(rows, grid)

    seen = replace(plain, rounder=counted, ratios=(1.0, 0.8), outcomes={})
    one, two = (find(plain, WeightFormat.parse(label)) for label in ("2c", "2"))
    better = seen.better(one, two)
    scaled = seen.rescaled(better)
    assert len(calls) == 3
    for grid in (better, scaled):
        assert torch.equal(seen.rounded(grid), plain.rounder(plain.rows, grid))
        torch.testing.assert_close(seen.error(grid), plain.error(grid), rtol=1e-5, atol=1e-5)
    assert len(calls) == 3
