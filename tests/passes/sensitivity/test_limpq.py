from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.core.facts import WeightGrids
from fxquant.core.ir import FakeQuantize, WeightFormat
from fxquant.core.run import CalibrationSet
from fxquant.passes.allocation import SOLVERS
from fxquant.passes.sensitivity import ESTIMATORS, limpq, rising_to_narrow
from tests.scoring import inputs, scorer, simulated


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None)
def test_the_repair_removes_every_inversion_and_changes_nothing_else(steps: list[float]) -> None:
    before = np.array(steps)
    after = rising_to_narrow(before)
    assert (np.diff(after) <= 0).all()
    assert (after >= before).all()
    assert np.array_equal(rising_to_narrow(after), after)
    # A step above those of all wider widths is no inversion.
    kept = [before[k] >= before[k:].max() for k in range(len(before))]
    assert np.array_equal(after[kept], before[kept])


def test_without_training_the_steps_are_the_calibrated_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limpq, "ITERATIONS", 0)
    each = scorer(simulated("split", (2, 4, 8), (4, 8)), CalibrationSet(inputs("split", 8)))
    found = np.diag(ESTIMATORS["limpq"].measure(each).values)
    for column, value in zip(each.columns, found, strict=True):
        (replacement,) = set(column.substitution.values())
        if isinstance(replacement, FakeQuantize):
            assert value == pytest.approx(float(replacement.scale), rel=1e-6)
        else:
            assert column.site is not None
            assert column.weight is not None
            scale = each.program[WeightGrids].at(column.site, column.weight).scale
            assert value == pytest.approx(limpq.ALPHA * float(scale.mean()), rel=1e-6)


def test_the_same_steps_again() -> None:
    each = scorer(simulated("split", (4, 8)), CalibrationSet(inputs("split", 16)))
    found = ESTIMATORS["limpq"].measure(each)
    again = ESTIMATORS["limpq"].measure(scorer(simulated("split", (4, 8)), each.images))
    assert np.array_equal(found.values, again.values)
    assert found.evaluations == 3 * limpq.ITERATIONS * limpq.TOGETHER


@pytest.mark.parametrize("share", [3.0, 1 / 3])
def test_a_step_that_is_calibrated_badly_is_learned_better(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    program = simulated("split", (4,))
    known = program[WeightGrids]
    chosen = WeightFormat(4)
    bad = {
        site: {chosen: replace(grids[chosen], scale=grids[chosen].scale * (share if site == "a" else 1.0))}
        for site, grids in known.grids.items()
    }
    images, steps = CalibrationSet(inputs("split", 32)), []
    for iterations in (0, limpq.ITERATIONS):
        monkeypatch.setattr(limpq, "ITERATIONS", iterations)
        # A scorer keeps what it has measured.
        each = scorer(program.with_facts(WeightGrids(bad)), images, "mse")
        assert each.columns[0].site == "a"
        steps.append(float(ESTIMATORS["limpq"].measure(each).values[0, 0]))
    start, learned = steps
    assert (learned < 0.8 * start) if share > 1 else (learned > 1.25 * start)


def test_the_linear_program_of_54_groups_takes_the_least_steps() -> None:
    random = np.random.default_rng(0)
    steps = np.concatenate([rising_to_narrow(np.sort(random.lognormal(size=5))[::-1]) for _ in range(54)])
    groups = [np.arange(5 * k, 5 * k + 5) for k in range(54)]
    costs = np.outer(random.uniform(1, 9, 54), [2.0, 3, 4, 5, 6]).reshape(1, -1)
    found = SOLVERS["linear"](np.diag(steps), groups, costs, [0.6 * costs[0, 4::5].sum()], time_limit=1.0)
    assert found.status == "optimal"
