from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant.passes.sensitivity import coverage_pairs, link
from tests.passes.sensitivity.runs import made_up


def back(units: float, ceiling: float) -> float:
    """The link undone: units to loss."""
    return float(ceiling * (1 - np.exp(-units)))


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_two_substitutions_are_predicted_exactly_through_the_link(start: float) -> None:
    runs = made_up(4, start)
    found = coverage_pairs(runs)
    ceiling, values = found.notes["ceiling"], found.values
    assert found.constant is not None
    for i, j in zip(*np.nonzero(runs.measured), strict=True):
        units = found.constant + values[i, i] + values[j, j] + 2 * values[i, j]
        assert back(units, ceiling) == pytest.approx(start + runs.joint[i, j].mean())


def test_damage_that_covers_adds_up_exactly() -> None:
    """Independent coverage, `1 - (1 - a)(1 - b)`: pair terms of the loss are `-a b`, those of the units are 0."""
    a, b, ceiling = 0.4, 0.7, 1.0
    both = 1 - (1 - a) * (1 - b)
    assert both - a - b == pytest.approx(-a * b)
    u = link(np.array([a, b, both]), ceiling)
    assert u[2] - u[0] - u[1] == pytest.approx(0.0, abs=1e-12)


def test_around_a_plan_its_own_choices_stay_at_zero() -> None:
    runs = made_up(4, 0.3)
    runs.alone[0] = 0.0
    runs.joint[0] = np.where(runs.measured[0][:, None], runs.alone, 0.0)
    runs.joint[:, 0] = runs.joint[0]
    found = coverage_pairs(runs)
    np.testing.assert_allclose(found.values[0], 0.0, atol=1e-12)
    assert found.constant is not None
    assert back(found.constant, found.notes["ceiling"]) == pytest.approx(0.3)


@given(st.lists(st.floats(-5, 50), min_size=2, max_size=8, unique=True), st.floats(0.1, 60))
def test_the_link_keeps_the_order_of_losses(losses: list[float], ceiling: float) -> None:
    units = link(np.array(sorted(losses)), ceiling)
    assert np.isfinite(units).all()
    assert (np.diff(units) >= 0).all()
    assert link(np.zeros(1), ceiling)[0] == 0
