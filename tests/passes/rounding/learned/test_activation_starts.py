"""Grids found for a unit's activations: of least error, in graph order, each on what those before it rounded."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fxquant.core.ir import Grid, activation_spec
from fxquant.passes.rounding.learned import POWER, activation_starts


def uniform(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 3001)


def error(values: Tensor, grid: Grid) -> float:
    return float((values - grid.round_trip(values)).abs().pow(POWER).mean())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.5, 2.0)])
def test_the_grid_found_has_no_more_error_than_one_that_covers_the_values(bits: int, low: float, high: float) -> None:
    # A long tail, which is worth clipping at few bits.
    values = uniform(low, high).sign() * uniform(low, high).abs().pow(3)
    covering = Grid.covering(values.min(), values.max(), activation_spec(bits))
    (grid,) = activation_starts({"g": covering}, lambda *_: values).values()
    assert (grid.spec, grid.scale.shape, grid.zero_point.shape) == (covering.spec, (), ())
    assert error(values, grid) <= error(values, covering) * 1.01
    if bits == 2:
        assert error(values, grid) < 0.8 * error(values, covering)


def test_two_bits_of_evenly_spread_values_clip_half_a_step() -> None:
    # Levels 0, s, 2s, 3s of numbers spread evenly over 0..1: their errors to the power 2.4 add up to
    # (6 (s / 2)^3.4 + (1 - 3s)^3.4) / 3.4, which is least where s / 2 = 1 - 3s.
    known = Grid.covering(torch.tensor(0.0), torch.tensor(1.0), activation_spec(2))
    (grid,) = activation_starts({"g": known}, lambda *_: uniform(0, 1)).values()
    assert float(grid.scale) == pytest.approx(2 / 7, abs=0.01)
    assert int(grid.zero_point) == 0


def test_later_groups_see_the_grids_of_earlier_ones() -> None:
    seen = list[tuple[str, tuple[str, ...]]]()

    def values(group: str, found: Mapping[str, Grid]) -> Tensor:
        seen.append((group, tuple(found)))
        return uniform(0, 1)

    known = Grid.covering(torch.tensor(0.0), torch.tensor(1.0), activation_spec(4))
    activation_starts({"a": known, "b": known, "c": known}, values)
    assert seen == [("a", ()), ("b", ("a",)), ("c", ("a", "b"))]
