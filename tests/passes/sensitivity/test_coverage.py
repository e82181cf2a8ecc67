from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant.core.facts import BitAllocation
from fxquant.core.ir import Choice, Sites
from fxquant.core.run import CalibrationSet
from fxquant.core.storage import ScoreStore
from fxquant.passes.sensitivity import ESTIMATORS, Scorer, link
from tests.scoring import full_forward_losses, inputs, scorer, simulated

coverage = ESTIMATORS["coverage"]
pairs = ESTIMATORS["pairs"]


IMAGES = CalibrationSet(inputs("plain", 6))


def back(units: float, ceiling: float) -> float:
    """The link undone: units to loss."""
    return float(ceiling * (1 - np.exp(-units)))


def test_two_substitutions_are_predicted_exactly_through_the_link() -> None:
    found = coverage(scorer(simulated("plain"), IMAGES))
    ceiling = found.notes["ceiling"]
    narrow = [c for c in found.candidates if c.choice.weight_bits == 2]
    for one in narrow:
        for other in narrow:
            if one.site < other.site:
                expected = float(full_forward_losses("plain", IMAGES, "kl", one, other).mean())
                units = found.predict({c.site: c.choice for c in (one, other)})
                assert back(units, ceiling) == pytest.approx(expected, rel=1e-3)


def test_damage_that_covers_adds_up_exactly() -> None:
    """Independent coverage, `1 - (1 - a)(1 - b)`: pair terms of the loss are `-a b`, those of the units are 0."""
    a, b, ceiling = 0.4, 0.7, 1.0
    both = 1 - (1 - a) * (1 - b)
    assert both - a - b == pytest.approx(-a * b)
    u = link(np.array([a, b, both]), ceiling)
    assert u[2] - u[0] - u[1] == pytest.approx(0.0, abs=1e-12)


def test_it_shares_the_measurements_of_pairs() -> None:
    store = ScoreStore(None, {})
    each = scorer(simulated("plain"), IMAGES, store=store)
    exact = pairs(each)
    before = each.replay.spent
    found = coverage(each)
    assert each.replay.spent == before
    assert found.evaluations == exact.evaluations
    assert found.unit == "coverage units"


def test_around_a_plan_its_own_choices_stay_at_zero() -> None:
    program = simulated("plain")
    plan = BitAllocation({site.name: Choice(4, 8) for site in program[Sites].sites})
    found = coverage(Scorer(program, IMAGES, "kl", ScoreStore(None, {}), context=plan))
    own = [k for k, c in enumerate(found.candidates) if c.choice.weight_bits == 4]
    np.testing.assert_allclose(found.values[own], 0.0, atol=1e-12)
    assert back(found.constant, found.notes["ceiling"]) > 0


@given(st.lists(st.floats(-5, 50), min_size=2, max_size=8, unique=True), st.floats(0.1, 60))
def test_the_link_keeps_the_order_of_losses(losses: list[float], ceiling: float) -> None:
    units = link(np.array(sorted(losses)), ceiling)
    assert np.isfinite(units).all()
    assert (np.diff(units) >= 0).all()
    assert link(np.zeros(1), ceiling)[0] == 0
