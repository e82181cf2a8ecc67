from __future__ import annotations

import numpy as np
import pulp
import pytest

from fxquant.core.errors import MissingDependencyError
from fxquant.passes.allocation import SOLVERS, Clock, Problem, add_choices, cbc, solve_linearised
from tests.passes.allocation.instances import needs_data, random_instance, real_instance


def knapsack_model(scores: list[float]) -> cbc.Model:
    model = cbc.Model()
    variables = [model.add_variable(f"x{i}", score, binary=True) for i, score in enumerate(scores)]
    model.add_constraint([(variable, 1.0) for variable in variables], "==", 1.0)
    return model


def test_optimal_with_scores_far_below_cbcs_tolerances() -> None:
    result = knapsack_model([3e-9, 1e-9, 2e-9]).solve(10)
    assert result.status == "optimal"
    assert result.values is not None
    assert result.values.tolist() == [0, 1, 0]
    assert result.bound == pytest.approx(1e-9, rel=1e-3)
    assert result.bound <= 1e-9


def test_scores_far_below_cbcs_tolerances_leave_the_plan_as_it_is() -> None:
    """CBC drops improvements below 1e-4 and reduced costs below 1e-7 unless the objective is scaled."""
    for seed in range(6):
        instance = random_instance(seed, groups=9, rows=2, kind="diagonal", tightness=0.3)
        tiny, usual = (SOLVERS["linear"](instance.values * size, *instance.arguments[1:]) for size in (1e-9, 1.0))
        assert np.array_equal(tiny.choice, usual.choice)


def test_infeasible_is_distinguished_from_a_timeout() -> None:
    model = cbc.Model()
    variable = model.add_variable("x", 1.0, binary=True)
    model.add_constraint([(variable, 2.0)], "==", 1.0)
    result = model.solve(10)
    assert result.status == "infeasible"
    assert result.values is None
    assert result.bound == np.inf


@needs_data
def test_a_timeout_is_stopped_with_cbcs_own_bound() -> None:
    """PuLP calls this "Optimal"; the proof takes CBC seconds, and half a second is allowed."""
    problem = Problem.checked(*real_instance("resnet20_gram", 3).arguments)
    choice, bound = solve_linearised(problem, Clock(0.5))
    assert bound < 2.9931450 - 0.01
    if choice is not None:
        assert problem.objective(choice) >= 2.9931450


def test_partial_search_bound_is_not_the_rounded_one() -> None:
    log = (
        "Cbc0005I Partial search - best objective 2.9931451 (best possible 2.6096912), took 1065 iterations\n"
        "Lower bound:                    2.610\n"
    )
    bound = cbc._bound("stopped", None, log, np.array([1.0]), 1.0)
    assert 2.6096 < bound < 2.6096912


def test_no_program_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", "/nowhere/cbc")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingDependencyError, match="pulp"):
        knapsack_model([1.0, 2.0]).solve(1)


def test_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    knapsack_model([1.0, 2.0]).solve(5)
    assert capfd.readouterr() == ("", "")


def test_limits_of_any_scale_reach_cbc() -> None:
    for scale in (1e-6, 1.0, 1e9):
        instance = random_instance(4, groups=6, rows=1, kind="diagonal", tightness=0.4)
        problem = Problem(instance.values, tuple(instance.groups), instance.costs * scale, instance.limits * scale)
        model = cbc.Model()
        add_choices(model, problem, np.diag(problem.values))
        result = model.solve(10)
        assert result.values is not None
        assert problem.feasible(result.values > 0.5)
