from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxquant
from fxquant.core.errors import OptionError
from fxquant.core.ir import SMALLEST_SCALE, FakeQuantize, Grid, QuantSpec, activation_spec

SPECS = st.one_of(
    st.builds(QuantSpec, st.integers(2, 8), st.just(True), st.just(True)),
    st.builds(QuantSpec, st.integers(2, 8), st.booleans(), st.just(False)),
)
ENDS = st.floats(-(2.0**122), 2.0**122, width=32)
VALUES = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20).map(torch.tensor)
PROPERTY = settings(max_examples=60, deadline=None)


def covering(low: float, high: float, spec: QuantSpec) -> Grid:
    return Grid.covering(torch.tensor(low), torch.tensor(high), spec)


@PROPERTY
@given(ENDS, ENDS, SPECS)
def test_grid_is_finite_and_holds_zero_exactly(one: float, other: float, spec: QuantSpec) -> None:
    grid = covering(min(one, other), max(one, other), spec)
    scale, zero_point = grid.scale, grid.zero_point
    assert torch.isfinite(scale)
    assert scale >= SMALLEST_SCALE
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert spec.qmin <= int(zero_point) <= spec.qmax
    assert not spec.symmetric or int(zero_point) == 0
    assert float(grid.round_trip(torch.zeros(1))) == 0.0


@PROPERTY
@given(VALUES, SPECS)
def test_error_is_half_a_step_inside_the_range(x: Tensor, spec: QuantSpec) -> None:
    grid = Grid.covering(x.min(), x.max(), spec)
    error = (grid.round_trip(x) - x).abs()
    # Rounding the zero-point moves an affine grid by up to half a step, so that its ends may clip by as much.
    allowed = 0.5 if spec.symmetric else 1.0
    assert bool((error <= grid.scale * allowed * (1 + 1e-5) + 1e-6 * x.abs()).all())


@PROPERTY
@given(VALUES, SPECS, st.floats(0.01, 10.0))
def test_round_trip_is_idempotent_monotone_and_on_the_grid(x: Tensor, spec: QuantSpec, high: float) -> None:
    grid = covering(-high / 3, high, spec)
    x = x.sort().values
    once = grid.round_trip(x)
    assert torch.equal(grid.round_trip(once), once)
    assert bool((once.diff() >= 0).all())
    q = grid.quantize(x)
    assert q.dtype == torch.int32
    assert spec.qmin <= int(q.min()) <= int(q.max()) <= spec.qmax
    assert torch.equal(grid.dequantize(q), once)


@pytest.mark.parametrize(("value", "expected"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-2.5, -2)])
def test_halves_go_to_the_even_neighbour(value: float, expected: int) -> None:
    spec = QuantSpec(8, signed=True, symmetric=True)
    assert int(Grid(spec, torch.tensor(1.0), torch.tensor(0)).quantize(torch.tensor(value))) == expected
    # Whatever the zero-point: rounding comes before the shift, as in ONNX.
    affine = QuantSpec(8, signed=False, symmetric=False)
    assert int(Grid(affine, torch.tensor(1.0), torch.tensor(7)).quantize(torch.tensor(value))) == expected + 7


@pytest.mark.parametrize("spec", [activation_spec(8), QuantSpec(4, True, True)])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (1e-42, 2e-42), (5.0, 5.0), (-3.0, -3.0), (-1e37, 1e37)])
def test_degenerate_ranges(low: float, high: float, spec: QuantSpec) -> None:
    grid = covering(low, high, spec)
    seen = grid.round_trip(torch.tensor([low, high, 0.0]))
    assert bool(torch.isfinite(seen).all())
    assert bool(((seen - torch.tensor([low, high, 0.0])).abs() <= grid.scale).all())


@PROPERTY
@given(VALUES, SPECS, st.floats(0.01, 2e3))
def test_fake_quantize_agrees_with_round_trip(x: Tensor, spec: QuantSpec, high: float) -> None:
    grid = covering(-high / 2, high, spec)
    simulated = FakeQuantize(grid)(x)
    exact = grid.round_trip(x)
    assert bool(((simulated - exact).abs() <= grid.scale * 1.001).all())
    # The kernel multiplies by 1 / scale and rounds after the shift: only values at a tie may differ.
    steps = x.double() / grid.scale.double()
    from_tie = ((steps - steps.floor()) - 0.5).abs()
    clear = from_tie > 1e-6 * (1 + steps.abs())
    assert torch.equal(simulated[clear], exact[clear])


@PROPERTY
@given(st.integers(2, 8), st.integers(0, 2**31))
def test_weight_search_beats_every_plain_clip(bits: int, seed: int) -> None:
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    weight[1] = 0.0
    weight[2] *= 1e-3
    grid = Grid.of_weight(weight, bits)
    spec, zero_point = grid.spec, grid.zero_point
    assert grid.scale.shape == (5,)
    assert zero_point.dtype == torch.int32
    assert not zero_point.any()
    error = (grid.round_trip(weight) - weight).square().flatten(1).sum(1)
    for ratio in np.linspace(0.3, 1.0, 9):
        plain = (weight.abs().flatten(1).amax(1) * float(ratio) / spec.qmax).clamp(min=SMALLEST_SCALE)
        other = (Grid(spec, plain, zero_point).round_trip(weight) - weight).square().flatten(1).sum(1)
        # 40 ratios lie close to each of these nine; 2 bits react strongly to small steps of the ratio.
        assert bool((error <= other * 1.1 + 1e-9).all())
    assert not grid.round_trip(weight)[1].any()


def test_weight_search_uses_the_longer_negative_side() -> None:
    # -4..3 with step 1 is exactly the signed 3-bit grid, out of reach for scale max|w| / qmax.
    weight = torch.arange(-4.0, 4.0).reshape(1, 8)
    assert torch.equal(Grid.of_weight(weight, 3).round_trip(weight), weight)


def test_channels_lie_along_the_given_axis() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    by_row, by_column = Grid.of_weight(weight, 4), Grid.of_weight(weight.t().contiguous(), 4, 1)
    assert torch.equal(by_row.scale, by_column.scale)
    assert torch.equal(by_column.round_trip(weight.t()), by_row.round_trip(weight).t())


@pytest.mark.parametrize("axis", [0, 1])
def test_one_scale_for_all_channels_is_that_of_the_weight_as_one_row(axis: int) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    shared = Grid.of_weight(weight, 4, axis, per_channel=False)
    row = Grid.of_weight(weight.reshape(1, -1), 4)
    assert shared.scale.tolist() == row.scale.tolist() * weight.shape[axis]
    assert shared.zero_point.shape == shared.scale.shape
    assert shared.spec.channel_axis == axis


def test_scale_and_zero_point_of_different_shapes_are_refused() -> None:
    with pytest.raises(OptionError, match=r"shapes \(2,\) and \(\); give them the same one"):
        Grid(activation_spec(4), torch.ones(2), torch.tensor(0))


def test_specs_follow_from_bits_in_one_place() -> None:
    """A `QuantSpec` is no choice: grids are made from bits, and the specs of weights and activations with them."""
    root = Path(fxquant.__file__).parent
    callers = {
        path.relative_to(root).as_posix()
        for part in (root, root / "passes", root / "backends")
        for path in part.rglob("*.py")
        if re.search(r"(?<!def )\b(QuantSpec|activation_spec|weight_spec)\(", path.read_text())
    }
    readers = ("core/facts/rounding.py", "core/facts/weight_grids.py")
    published = "passes/rounding/learned/asymmetric.py"
    assert callers == {
        "core/ir/spec.py",
        "core/ir/grid.py",
        "core/ir/row_grid.py",
        "core/facts/ranges.py",
        *readers,
        published,
    }
