from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.core.errors import CalibrationError
from fxquant.core.facts import (
    BINS,
    GAUSSIAN_STEPS,
    Histogram,
    Ranges,
    clip_error,
    gaussian_range,
    merged,
    mse_range,
)
from fxquant.core.ir import SMALLEST_SCALE, activation_spec
from fxquant.core.run import MseObserver


def seen(*values: float, scale: float = 1.0) -> Histogram:
    observer = MseObserver("v")
    observer(torch.tensor(values) * scale)
    return observer.histogram()


def gaussian(seed: int, spread: float = 1.0, outlier: float = 0.0) -> Histogram:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(seed)) * spread
    observer = MseObserver("v")
    observer(torch.cat([values, torch.tensor([outlier])]))
    return observer.histogram()


def test_mse_range_is_the_best_of_its_clips() -> None:
    histogram, spec = gaussian(0, outlier=30.0), activation_spec(4)
    low, high = mse_range(histogram, spec)
    assert low >= histogram.minimum
    assert high <= histogram.maximum
    assert high < 15.0, "one outlier in 4000 must not set the step of a 4-bit grid"
    best = clip_error(histogram, low, high, spec)
    for ratio in np.linspace(0.2, 1.0, 17):
        assert best <= clip_error(histogram, histogram.minimum * ratio, histogram.maximum * ratio, spec) * 1.02


def test_clip_error_is_the_real_one() -> None:
    observer = MseObserver("v")
    values = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    observer(values)
    spec = activation_spec(4)
    grid = Ranges({"v": observer.histogram()}, "full").grid(["v"], 4)
    real = float((grid.round_trip(values) - values).square().sum())
    histogram = observer.histogram()
    assert clip_error(histogram, histogram.minimum, histogram.maximum, spec) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-30, 1e30])
@pytest.mark.parametrize("clip", ["mse", "full"])
def test_constant_values_get_a_usable_grid(value: float, clip: str) -> None:
    grid = Ranges({"v": seen(value, value)}, clip).grid(["v"], 8)
    assert float(grid.scale) >= SMALLEST_SCALE
    back = grid.round_trip(torch.tensor(value))
    assert abs(float(back) - value) <= float(grid.scale) * 1.01 + abs(value) * 0.01


@given(st.lists(st.integers(0, 50), min_size=2, max_size=4), st.floats(0.01, 100.0))
@settings(max_examples=20, deadline=None)
def test_merging_covers_all_and_weighs_members_alike(seeds: list[int], spread: float) -> None:
    members = [gaussian(seed, spread ** (index % 2)) for index, seed in enumerate(seeds)]
    union = merged(members)
    assert union.minimum == min(h.minimum for h in members)
    assert union.maximum == max(h.maximum for h in members)
    assert union.counts.sum() == pytest.approx(len(members))
    assert union.low <= min(h.low for h in members)
    assert merged(members[:1]) is members[0]


def test_merging_does_not_move_mass() -> None:
    union = merged([seen(0.0, 1.0, 1.0, 1.0), seen(0.0, -100.0)])
    mean = float((union.counts * union.centres).sum())
    assert mean == pytest.approx(0.75 - 50.0, abs=2 * union.width)


def test_unobserved_values_are_named() -> None:
    with pytest.raises(CalibrationError, match=r"values \['other'\] were never observed"):
        Ranges({"v": seen(1.0)}).grid(["v", "other"], 8)


def test_a_group_has_one_grid_and_asking_twice_gives_it_twice() -> None:
    ranges = Ranges({"a": seen(1.0, 2.0), "b": seen(-4.0, 1.0)}, "full")
    grid = ranges.grid(["a", "b"], 8)
    assert grid.spec == activation_spec(8)
    assert float(grid.scale) == pytest.approx(6.0 / 255)
    assert int(grid.zero_point) == 170
    assert ranges.grid(("a", "b"), 8) is grid
    assert float(ranges.grid(["a"], 8).scale) == pytest.approx(2.0 / 255)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0.0},
        {"minimum": float("nan")},
        {"low": float("-inf")},
        {"counts": np.zeros(BINS)},
        {"counts": np.ones(3)},
    ],
)
def test_histograms_are_validated(change: dict[str, Any]) -> None:
    good = Histogram(low=0.0, width=1.0, counts=np.ones(BINS), minimum=0.0, maximum=1.0)
    with pytest.raises(CalibrationError, match="histogram"):
        replace(good, **change)


def rounding_error_of_a_gaussian(step: float, bits: int) -> float:
    """Return the mean squared error of `2^bits` levels around 0 for a Gaussian of deviation 1, by integration."""
    x = np.linspace(-8, 8, 400_001)
    half = 2 ** (bits - 1)
    rounded = (np.clip(np.floor(x / step), -half, half - 1) + 0.5) * step
    return float((np.square(rounded - x) * np.exp(-x * x / 2)).sum() * (x[1] - x[0]) / np.sqrt(2 * np.pi))


@pytest.mark.parametrize("bits", list(GAUSSIAN_STEPS))
def test_gaussian_steps_are_the_numeric_optimum(bits: int) -> None:
    step = GAUSSIAN_STEPS[bits]
    tried = step * np.linspace(0.9, 1.1, 81)
    errors = [rounding_error_of_a_gaussian(float(each), bits) for each in tried]
    assert float(tried[int(np.argmin(errors))]) == pytest.approx(step, rel=0.01)


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("deviation", [0.01, 3.0])
def test_a_gaussian_gets_the_step_of_its_deviation(bits: int, deviation: float) -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(bits)) * deviation
    observer = MseObserver("v")
    observer(values)
    grid = Ranges({"v": observer.histogram()}, "gaussian").grid(["v"], bits)
    assert float(grid.scale) == pytest.approx(GAUSSIAN_STEPS[bits] * deviation, rel=0.01)


def test_the_gaussian_range_lies_around_the_mean_and_within_what_was_seen() -> None:
    observer = MseObserver("v")
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) + 1.5
    observer(values)
    low, high = gaussian_range(observer.histogram(), activation_spec(2))
    assert (low + high) / 2 == pytest.approx(1.5, abs=0.02)
    assert high - low == pytest.approx(3 * GAUSSIAN_STEPS[2], rel=0.02)
    observer = MseObserver("v")
    observer(values.relu())
    low, high = gaussian_range(observer.histogram(), activation_spec(8))
    reach = GAUSSIAN_STEPS[8] * 255 / 2 * float(values.relu().std())
    assert low == 0.0
    assert high == pytest.approx(float(values.relu().mean()) + reach, rel=0.01)
    assert gaussian_range(seen(0.0, 1.0, 1.0, 1.0), activation_spec(8)) == (0.0, 1.0)


def test_an_unknown_clip_is_refused() -> None:
    with pytest.raises(CalibrationError, match="clip 'best' of ranges is unknown; known: mse, full, gaussian"):
        Ranges({}, "best")


def test_save_and_load(tmp_path: Path) -> None:
    ranges = Ranges({"a": seen(1.0, 2.0), "b": gaussian(1)}, "full")
    ranges.save(tmp_path / "ranges.npz")
    back = Ranges.load(tmp_path / "ranges.npz")
    assert back.clip == "full"
    assert list(back.histograms) == ["a", "b"]
    for name, histogram in ranges.histograms.items():
        other = back.histograms[name]
        assert np.array_equal(histogram.counts, other.counts)
        assert (histogram.low, histogram.width) == (other.low, other.width)
        assert (histogram.minimum, histogram.maximum) == (other.minimum, other.maximum)
    Ranges({}).save(tmp_path / "ranges.npz")
    assert Ranges.load(tmp_path / "ranges.npz").histograms == {}
