from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from fxquant.core.errors import OptionError, SolverError
from fxquant.passes.allocation import SOLVERS, Problem, Solution, solve_exhaustive, solve_iqp
from tests.passes.allocation.instances import (
    Instance,
    golden_instance,
    golden_problems,
    needs_data,
    random_instance,
    random_instances,
)

TINY = Instance(
    np.array([[3.0, 0, 1, 0], [0, 1, 0, 2], [1, 0, 2, 0], [0, 2, 0, 1]]),
    [np.array([0, 1]), np.array([2, 3])],
    np.array([[1.0, 4, 1, 4]]),
    np.array([5.0]),
)


def assert_sound(instance: Instance, found: Solution, optimum: Solution) -> None:
    """bound <= optimum <= objective, a feasible plan, and figures that agree with one another."""
    assert (found.status == "infeasible") == (optimum.status == "infeasible")
    if found.status == "infeasible":
        assert not found.choice.any()
        assert found.objective == np.inf
        return
    problem = Problem.checked(*instance.arguments)
    tolerance = 2e-7 * abs(optimum.objective) + 1e-10
    assert problem.feasible(found.choice)
    assert found.objective == pytest.approx(problem.objective(found.choice))
    assert found.objective >= optimum.objective - tolerance
    assert found.bound <= optimum.objective + tolerance
    if found.status == "optimal":
        assert found.objective == pytest.approx(optimum.objective, rel=1e-6, abs=1e-9)
        assert found.gap == 0


@settings(max_examples=25, deadline=None)
@given(random_instances())
def test_iqp_equals_exhaustive(instance: Instance) -> None:
    optimum = SOLVERS["exhaustive"](*instance.arguments)
    found = solve_iqp(*instance.arguments, time_limit=20)
    assert_sound(instance, found, optimum)
    assert found.status != "feasible"


@settings(max_examples=25, deadline=None)
@given(random_instances(("diagonal",)))
def test_linear_equals_exhaustive(instance: Instance) -> None:
    found = SOLVERS["linear"](*instance.arguments)
    assert_sound(instance, found, SOLVERS["exhaustive"](*instance.arguments))
    assert found.status != "feasible"


@pytest.mark.parametrize("kind", ["convex", "indefinite", "diagonal"])
def test_greedy_is_feasible_and_its_bound_valid(kind: str) -> None:
    for seed in range(8):
        instance = random_instance(seed, groups=5, rows=seed % 3, kind=kind, tightness=0.5)
        optimum = SOLVERS["exhaustive"](*instance.arguments)
        if optimum.status == "optimal":
            assert_sound(instance, SOLVERS["greedy"](*instance.arguments), optimum)


def test_exhaustive_on_a_problem_solved_by_hand() -> None:
    # Plans: (0,2) 3+2+2 = 7, cost 2; (0,3) 4, cost 5; (1,2) 3, cost 5; (1,3) 6, cost 8 is over the limit.
    found = SOLVERS["exhaustive"](*TINY.arguments)
    assert found.choice.tolist() == [False, True, True, False]
    assert found.objective == 3.0


@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_solver_proves_infeasibility(name: str) -> None:
    found = SOLVERS[name](np.eye(4), TINY.groups, TINY.costs, np.array([1.0]))
    assert found.status == "infeasible"
    assert found.objective == np.inf
    assert not found.choice.any()


def test_infeasible_only_together() -> None:
    # Each row and each choice fits alone; no plan keeps both rows, which only a search can see.
    costs = np.array([[0.0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0]])
    groups = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5])]
    values = np.ones((6, 6))
    found = solve_iqp(values, groups, costs, np.array([1.0, 1.0]))
    assert found.status == "infeasible"


@pytest.mark.parametrize("bits_as_weights", [False, True])
def test_ties_are_kept_and_reached(bits_as_weights: bool) -> None:
    instance = random_instance(5, groups=6, rows=1, kind="convex", tightness=0.6)
    sizes = [len(group) for group in instance.groups]
    first, second = np.argsort(sizes, kind="stable")[-2:]
    pairs = list(zip(instance.groups[first], instance.groups[second], strict=False))
    ties = np.zeros((1 if bits_as_weights else len(pairs), len(instance.values)))
    for number, (left, right) in enumerate(pairs):
        row, weight = (0, float(number + 1)) if bits_as_weights else (number, 1.0)
        ties[row, left], ties[row, right] = weight, -weight
    costs = np.concatenate([instance.costs, ties, -ties])
    limits = np.concatenate([instance.limits, np.zeros(2 * len(ties))])
    tied = Instance(instance.values, instance.groups, costs, limits)
    found = solve_iqp(*tied.arguments)
    assert_sound(tied, found, SOLVERS["exhaustive"](*tied.arguments))
    assert (ties @ found.choice == 0).all()


@needs_data
@pytest.mark.parametrize("solver", ["linear", "iqp"])
@pytest.mark.parametrize("problem", golden_problems(), ids=lambda p: f"{p['network']}-{p['cost']}-{p['fraction']}")
def test_golden_linear_problems(problem: dict[str, Any], solver: str) -> None:
    instance = golden_instance(problem)
    found = SOLVERS[solver](*instance.arguments)
    assert found.status == "optimal"
    assert f"{found.objective:.6f}" == f"{problem['optimum']:.6f}"
    assert instance.costs[0] @ found.choice <= problem["limit"] + 1e-9


def test_entries_inside_a_group_never_count() -> None:
    values = TINY.values.copy()
    values[0, 1] = values[1, 0] = -1e6
    assert solve_iqp(values, *TINY.arguments[1:]).objective == solve_iqp(*TINY.arguments).objective


def test_no_limits_at_all() -> None:
    found = solve_iqp(TINY.values, TINY.groups, [], [])
    assert found.status == "optimal"
    assert found.objective == 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.ones((2, 3))}, "square"),
        ({"values": np.full((4, 4), np.nan)}, "finite"),
        ({"values": np.triu(np.ones((4, 4)))}, "symmetric"),
        ({"groups": [[0, 1], [2]]}, "exactly once"),
        ({"groups": [[0, 1], [1, 2, 3]]}, "exactly once"),
        ({"groups": [[0, 1], [2, 3], []]}, "non-empty"),
        ({"groups": [[0.5, 1], [2, 3]]}, "integers"),
        ({"costs": np.ones((1, 3))}, "shape"),
        ({"limits": np.ones(2)}, "shape"),
        ({"limits": np.array([np.inf])}, "finite"),
        ({"values": "many"}, "numbers"),
    ],
)
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_unusable_input_is_refused(solver: str, change: dict[str, Any], message: str) -> None:
    given_arguments: dict[str, Any] = {
        "values": np.diag(np.diag(TINY.values)),
        "groups": TINY.groups,
        "costs": TINY.costs,
        "limits": TINY.limits,
    }
    with pytest.raises(OptionError, match=message):
        SOLVERS[solver](**(given_arguments | change))


@pytest.mark.parametrize("time_limit", [0.0, -1.0, float("nan")])
def test_a_time_limit_that_is_no_time_is_refused(time_limit: float) -> None:
    with pytest.raises(OptionError, match="time_limit"):
        solve_iqp(*TINY.arguments, time_limit=time_limit)


def test_linear_refuses_pair_terms() -> None:
    with pytest.raises(OptionError, match="pair terms"):
        SOLVERS["linear"](*TINY.arguments)


def with_borders(seed: int, diagonal: bool) -> tuple[Problem, dict[int, np.ndarray[Any, np.dtype[np.float64]]]]:
    """A chain of three to six groups in which one limit also counts what neighbouring choices cost together."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 4, random.integers(3, 7))
    ends = np.cumsum(sizes)
    groups = tuple(np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True))
    count = int(ends[-1])
    cross = random.normal(size=(count, count)) * (0.0 if diagonal else 0.3)
    values = cross + cross.T + np.diag(random.random(count) * 3)
    products = np.zeros((count, count))
    for first, second in itertools.pairwise(groups):
        products[np.ix_(first, second)] = random.random((len(first), len(second))) * (random.random() < 0.8)
    products += products.T
    costs = random.random((2, count))
    limits = np.array([random.uniform(0.3, 1.2) * len(sizes), 0.7 * len(sizes)])
    return Problem(values, groups, costs, limits), {0: products}


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_costs_of_two_choices_are_honoured_by_every_solver(seed: int, diagonal: bool) -> None:
    problem, products = with_borders(seed, diagonal)
    arguments = (problem.values, problem.groups, problem.costs, problem.limits)
    best = solve_exhaustive(*arguments, products=products)
    whole = Problem(*arguments, products)
    for name, solve in SOLVERS.items():
        if name in ("linear", "threshold") and not diagonal:
            continue
        try:
            found = solve(*arguments, products=products)
        except SolverError:
            assert name in ("greedy", "flips")
            continue
        if found.status == "infeasible":
            assert best.status == "infeasible"
            continue
        assert whole.feasible(found.choice)
        assert found.objective >= best.objective - 1e-9
        assert found.bound <= best.objective + 1e-6
        if name not in ("greedy", "threshold", "flips"):
            assert found.objective == pytest.approx(best.objective)


def test_products_that_are_no_cost_are_refused() -> None:
    problem, products = with_borders(0, diagonal=True)
    arguments = (problem.values, problem.groups, problem.costs, problem.limits)
    for wrong in ({0: -products[0]}, {0: np.triu(products[0])}, {5: products[0]}, {0: np.zeros((1, 1))}):
        with pytest.raises(OptionError, match="products of row"):
            Problem(*arguments, wrong)
