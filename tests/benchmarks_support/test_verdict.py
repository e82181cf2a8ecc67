"""The arithmetic of the study of verdicts: losses at a temperature, and which plan a judge picks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.verdict import Judge, picked, rho, softened
from fxquant.core.run import LOSSES

ORDER = np.array([2, 0, 1])


def test_softened_is_the_products_kl_and_tends_to_the_error_of_the_logits() -> None:
    draw = np.random.default_rng(0)
    reference, answers = (draw.normal(size=(5, 7)).astype(np.float32) for _ in range(2))
    expected = 4 * LOSSES["kl"](torch.from_numpy(reference / 2), torch.from_numpy(answers / 2), None)
    assert softened(reference, answers, 2.0) == pytest.approx(expected.numpy(), rel=1e-5)
    assert softened(reference, answers, 1e3) == pytest.approx(softened(reference, answers, 0.0), rel=1e-2)
    assert softened(reference, reference + 3.0, 0.0).max() < 1e-12, "a constant added to all logits changes nothing"


def test_without_margin_the_least_mean_is_picked_among_the_plans_looked_at() -> None:
    losses = np.array([[3.0, 1.0], [1.0, 1.0], [2.0, 2.5]])
    assert picked(losses, ORDER, Judge()) == (1, 1.0)
    assert picked(losses, ORDER[:2], Judge()) == (0, 1.0)


@pytest.mark.parametrize(("margin", "plan"), [(0.0, 1), (1.0, 1), (2.0, 1), (4.0, 2)])
def test_a_margin_protects_the_plan_that_comes_first(margin: float, plan: int) -> None:
    # Plan 0 is better than 2 by .25 with a standard error of 1.25, plan 1 by 1.5 with one of .5.
    losses = np.array([[1.0, 3.0], [0.5, 1.0], [2.5, 2.0]])
    assert picked(losses, ORDER, Judge(margin=margin)) == (plan, 1.0)


def test_in_a_race_a_plan_that_is_clearly_worse_at_first_is_not_run_on() -> None:
    # Plan 0 is worse on the first two images, and would be best on all four.
    losses = np.array([[3.0, 3.1, 0.0, 0.0], [1.8, 1.8, 1.8, 1.8], [2.0, 2.0, 2.0, 2.0]])
    assert picked(losses, ORDER, Judge()) == (0, 1.0)
    assert picked(losses, ORDER, Judge(race=0.5)) == (1, 10 / 12)


def test_rank_correlation() -> None:
    assert rho(np.array([1.0, 2.0, 30.0]), np.array([0.1, 0.2, 0.3])) == pytest.approx(1.0)
    assert rho(np.array([1.0, 2.0, 30.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1.0)
