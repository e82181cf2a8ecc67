from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant.core.errors import CalibrationError
from fxquant.core.run import DENSE_LIMIT, OBSERVERS, MinMaxObserver, MovingAverageObserver, PercentileObserver

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
BATCHES = st.lists(st.lists(FLOATS, min_size=1, max_size=8).map(torch.tensor), min_size=1, max_size=6)


@pytest.mark.parametrize("name", list(OBSERVERS))
def test_observers_pass_their_input_on_unchanged(name: str) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert OBSERVERS[name]("v")(x) is x


@given(BATCHES)
@settings(max_examples=80, deadline=None)
def test_no_count_is_lost_whatever_the_batches(batches: list[Tensor]) -> None:
    observer = MinMaxObserver("v")
    for batch in batches:
        observer(batch)
    values = torch.cat(batches)
    histogram = observer.histogram()
    assert histogram.counts.sum() == values.numel()
    assert histogram.minimum == float(values.min())
    assert histogram.maximum == float(values.max())
    assert histogram.low <= min(float(values.min()), 0.0)
    assert observer.batches == len(batches)


@given(st.integers(0, 1000), st.lists(st.integers(1, 99), max_size=5))
@settings(max_examples=30, deadline=None)
def test_any_split_sees_the_same(seed: int, cuts: list[int]) -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(seed))
    whole, parts = MinMaxObserver("v"), MinMaxObserver("v")
    whole(values)
    for part in torch.tensor_split(values, sorted(cuts)):
        parts(part)
    one, other = whole.histogram(), parts.histogram()
    assert (one.minimum, one.maximum) == (other.minimum, other.maximum)
    assert one.counts.sum() == other.counts.sum() == 100
    # Growth at most doubles the bins and shifts centres by half a bin of the wider grid.
    for histogram in (one, other):
        mean = float((histogram.counts * histogram.centres).sum()) / 100
        assert mean == pytest.approx(float(values.mean()), abs=2 * max(one.width, other.width))


def test_growth_keeps_the_distribution() -> None:
    observer = MinMaxObserver("v")
    observer(torch.linspace(0, 1, 1000))
    observer(torch.linspace(-50, 50, 1000))
    histogram = observer.histogram()
    inside = (histogram.centres > -0.1) & (histogram.centres < 1.1)
    assert histogram.counts[inside].sum() == pytest.approx(1012, abs=4)


def test_integers_and_booleans_can_be_watched() -> None:
    observer = MinMaxObserver("ids")
    ids = torch.tensor([[3, 7], [0, 2]])
    assert observer(ids) is ids
    observer(torch.tensor([True, False]))
    assert (observer.minimum, observer.maximum) == (0.0, 7.0)
    assert observer.histogram().counts.sum() == 6


def test_a_large_map_is_sampled_but_its_ends_are_not() -> None:
    x = torch.zeros(3 * DENSE_LIMIT)
    x[7], x[11] = -5.0, 9.0
    observer = MinMaxObserver("v")
    observer(x)
    histogram = observer.histogram()
    assert (histogram.minimum, histogram.maximum) == (-5.0, 9.0)
    assert histogram.counts.sum() == pytest.approx(x.numel(), rel=1e-3)


def test_empty_batches_count_for_nothing() -> None:
    observer = MinMaxObserver("v")
    observer(torch.zeros(0, 3))
    with pytest.raises(CalibrationError, match="'v' was never observed"):
        observer.histogram()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_name_the_node(bad: float) -> None:
    with pytest.raises(CalibrationError, match="value 'conv3' is not finite"):
        MinMaxObserver("conv3")(torch.tensor([1.0, bad]))


def test_moving_average_follows_its_formula() -> None:
    observer = MovingAverageObserver("v")
    for low, high in ((-1.0, 1.0), (-3.0, 2.0), (0.5, 5.0)):
        observer(torch.tensor([low, high]))
    assert observer.minimum == pytest.approx(0.9 * (0.9 * -1 + 0.1 * -3) + 0.1 * 0.5)
    assert observer.maximum == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 5)


def test_percentile_cuts_the_tails_only() -> None:
    observer = PercentileObserver("v")
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    values[:3] = torch.tensor([40.0, 50.0, -60.0])
    observer(values)
    histogram = observer.histogram()
    assert -0.1 < histogram.minimum <= 0.05
    assert 0.95 < histogram.maximum < 1.1
    plain = PercentileObserver("v")
    plain(torch.full((10,), 3.0))
    seen = plain.histogram()
    assert seen.minimum <= 3.0 <= seen.maximum + 1e-9
    assert np.isclose(seen.maximum, 3.0)
