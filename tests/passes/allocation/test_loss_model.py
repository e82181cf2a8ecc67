"""The corrected model of the loss: it learns what single candidates cost from plans."""

from __future__ import annotations

import numpy as np

from fxquant.passes.allocation import BoolArray, LossModel

SITES, WIDTHS = 6, 3


def plan(choices: np.ndarray) -> BoolArray:
    found = np.zeros(SITES * WIDTHS, dtype=bool)
    found[np.arange(SITES) * WIDTHS + choices] = True
    return found


def test_draws_come_to_predict_what_was_measured_and_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    prior, true = np.abs(rng.normal(1.0, 0.3, (2, SITES * WIDTHS)))
    model = LossModel(np.diag(prior), seed=1)
    plans = [plan(rng.integers(0, WIDTHS, SITES)) for _ in range(80)]
    for each in plans[:60]:
        model.add(each, float(true[each].sum()))
    drawn = np.diag(np.mean([model.draw() for _ in range(20)], axis=0))
    wanted = np.array([true[each].sum() for each in plans[60:]])
    before, after = (np.abs(np.array([v[each].sum() for each in plans[60:]]) - wanted) for v in (prior, drawn))
    assert after.mean() < 0.25 * before.mean()


def test_draws_differ_where_nothing_was_measured_and_a_seed_repeats_them() -> None:
    values = np.diag(np.ones(SITES * WIDTHS))
    first, again = (LossModel(values, seed=3) for _ in range(2))
    assert np.array_equal(first.draw(), values)
    for model in (first, again):
        model.add(plan(np.zeros(SITES, dtype=int)), 12.0)
        model.add(plan(np.ones(SITES, dtype=int)), float("nan"))
    one, other = first.draw(), first.draw()
    assert not np.array_equal(one, other)
    assert np.array_equal(one, again.draw())
    # The scale is that of what was measured: 12 over 6 sites.
    assert abs(np.diag(one)[::WIDTHS].sum() - 12.0) < 1.5
