"""Grids with levels, and their fake-quant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.core.errors import OptionError
from fxquant.core.ir import (
    Choice,
    FakeQuantize,
    Grid,
    RowGrid,
    WeightFormat,
    nearest_level,
    round_to_levels,
    weight_spec,
    whole_levels,
)

LEVELS = torch.tensor([[-100, -3, 0, 90], [-1, 0, 1, 1]], dtype=torch.int8)
GRID = Grid(weight_spec(8), torch.tensor([0.01, 0.5]), torch.zeros(2, dtype=torch.int32), LEVELS)


@given(st.lists(st.floats(-2, 2, width=32), min_size=6, max_size=6))
def test_every_value_goes_to_a_level_at_no_greater_distance_than_any_other(values: list[float]) -> None:
    x = torch.tensor(values).reshape(2, 3)
    q = GRID.quantize(x)
    distance = (x.unsqueeze(2) - LEVELS.unsqueeze(1) * GRID.scale.reshape(2, 1, 1)).abs()
    chosen = (x - GRID.dequantize(q)).abs()
    assert bool((chosen <= distance.amin(dim=2) + 1e-6).all())
    assert all(int(v) in LEVELS[row].tolist() for row in range(2) for v in q[row])


def test_ties_go_down_and_rows_of_fewer_levels_repeat_their_largest() -> None:
    assert nearest_level(torch.tensor([[0.5, -1.5]]), torch.tensor([[-2, -1, 0, 1]])).tolist() == [[0.0, -2.0]]
    assert nearest_level(torch.tensor([[5.0]]), torch.tensor([[-1, 1, 1, 1]])).tolist() == [[1.0]]


@pytest.mark.parametrize("axis", [0, 1])
def test_fake_quant_is_the_round_trip_along_any_axis(axis: int) -> None:
    spec = weight_spec(8, axis)
    grid = Grid(spec, GRID.scale, GRID.zero_point, LEVELS)
    x = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
    fake = FakeQuantize(grid)
    assert torch.equal(fake(x), grid.round_trip(x))
    other = FakeQuantize(Grid(spec, torch.ones(2), GRID.zero_point, torch.zeros_like(LEVELS)))
    other.load_state_dict(fake.state_dict())
    assert torch.equal(other(x), fake(x))
    fake.learn()
    assert torch.equal(fake(x), grid.round_trip(x)), "learning changes gradients, not values"
    fake.learn(False)
    assert torch.equal(fake.grid.levels if fake.grid.levels is not None else torch.empty(0), LEVELS)


def test_gradients_are_straight_through_between_the_ends() -> None:
    x = torch.tensor([[-2.0, -0.02, 0.4, 5.0]], requires_grad=True)
    scale = torch.tensor([0.01], requires_grad=True)
    levels = LEVELS[:1].float().requires_grad_()
    y = round_to_levels(x, scale, levels)
    assert torch.allclose(y, torch.tensor([[-1.0, -0.03, 0.0, 0.9]]))
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    assert scale.grad is not None
    assert levels.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    pace = (4 * 100.0) ** -0.5
    # The level beyond the ends, level - x / scale between them.
    assert float(scale.grad) == pytest.approx(pace * (-100 + (-3 + 2) + (0 - 40) + 90), rel=1e-4)
    assert torch.allclose(levels.grad, torch.full((1, 4), 0.01))


def test_learned_levels_end_as_ascending_int8() -> None:
    found = whole_levels(torch.tensor([[3.4, -200.0, 2.6, 500.0]]))
    assert found.tolist() == [[-128.0, 3.0, 3.0, 127.0]]


def test_rows_of_a_grid_and_back() -> None:
    rows = RowGrid.of(GRID, 2, 2)
    again = rows.grid()
    assert torch.equal(again.scale, GRID.scale)
    assert again.levels is not None
    assert torch.equal(again.levels, LEVELS)
    x = torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rows.nearest(x.double().reshape(2, 1, 7)).reshape(2, 7).int(), GRID.quantize(x.double()))


@pytest.mark.parametrize(
    ("levels", "match"),
    [
        (LEVELS.float(), "give int8"),
        (LEVELS[:1], r"of shape \(2, L\)"),
        (LEVELS.flip(1), "sort them"),
    ],
)
def test_levels_that_kernels_could_not_use_are_refused(levels: torch.Tensor, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        Grid(weight_spec(8), GRID.scale, GRID.zero_point, levels)
    with pytest.raises(OptionError, match="need the symmetric int8 grid"):
        Grid(weight_spec(4), GRID.scale, GRID.zero_point, LEVELS)


@pytest.mark.parametrize("label", ["W4A8", "W2cA8", "W3pA4", "W2.5rA8", "W1cA8", "float"])
def test_labels_parse_back(label: str) -> None:
    assert Choice.parse(label).label == label
    assert Choice.of(Choice.parse(label).weight, 8 if label == "float" else Choice.parse(label).activation_bits) == (
        Choice.parse(label)
    )


@pytest.mark.parametrize("label", ["W5cA8", "W2.5A8", "W1A8", "W9rA8", "W3xA8", "W2..5rA8", "Wc2A8"])
def test_labels_that_are_none(label: str) -> None:
    with pytest.raises(OptionError, match=r"out of range|not understood"):
        Choice.parse(label)


def test_formats_parse_from_labels_and_numbers() -> None:
    assert [WeightFormat.parse(text).label for text in (4, "4", "2c", 2.0, "2.5r")] == ["4", "4", "2c", "2", "2.5r"]
