from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings

from fxquant.passes.allocation import (
    SOLVERS,
    Clock,
    LocalSearch,
    Problem,
    branch_and_bound,
    iqp,
    reduce,
    solve_iqp,
    solve_linearised,
)
from tests.passes.allocation.instances import Instance, needs_data, random_instance, random_instances, real_instance
from tests.passes.allocation.test_solvers import assert_sound


@pytest.fixture
def only_branching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems would be tried out or given to CBC before a single node is branched on."""
    monkeypatch.setattr(branch_and_bound, "TRY_ALL", 1)
    monkeypatch.setattr(iqp, "CBC_PAIRS", 0)


@pytest.fixture
def counted_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at a clock takes 10 ms: how far a search gets depends on its steps, not on the machine."""
    looks = Counter[float]()

    def spent(clock: Clock) -> float:
        looks[clock.started] += 1
        return looks[clock.started] / 100

    monkeypatch.setattr(Clock, "spent", property(spent))


@pytest.mark.usefixtures("only_branching")
def test_branch_and_bound_equals_exhaustive() -> None:
    for seed in range(4):
        kind = "indefinite" if seed % 2 else "convex"
        instance = random_instance(seed, groups=7, rows=seed % 3, kind=kind, tightness=0.3)
        optimum = SOLVERS["exhaustive"](*instance.arguments)
        found = solve_iqp(*instance.arguments, time_limit=30)
        assert_sound(instance, found, optimum)
        assert found.status != "feasible"


def test_branch_and_bound_needs_no_incumbent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof must not lean on the local search having found the optimum already."""
    monkeypatch.setattr(branch_and_bound, "TRY_ALL", 8)
    for seed in range(8):
        instance = random_instance(seed, groups=6, rows=1, kind="indefinite", tightness=0.4)
        reduced = reduce(Problem.checked(*instance.arguments))
        assert reduced is not None
        clock = Clock(30)
        search = LocalSearch(reduced.problem, seed=0, clock=clock)
        # Neither starts nor kicks: plans come from tried-out remainders and rounding only.
        proof = branch_and_bound.BranchAndBound(reduced.problem, search, clock)
        proof.root()
        proof.run()
        optimum = SOLVERS["exhaustive"](*instance.arguments)
        assert search.best_objective == pytest.approx(optimum.objective)
        assert proof.bound == pytest.approx(optimum.objective, rel=1e-6)


def test_branch_and_bound_improves_a_nearly_optimal_incumbent(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the second-best plan known and no heuristics, only a sound cut-off leads to the best."""
    monkeypatch.setattr(branch_and_bound, "TRY_ALL", 4)
    monkeypatch.setattr(LocalSearch, "improve", lambda *_: None)
    for seed in range(10):
        instance = random_instance(seed, groups=5, rows=1, kind="indefinite", tightness=0.5)
        reduced = reduce(Problem.checked(*instance.arguments))
        assert reduced is not None
        problem = reduced.problem
        plans = [np.array(plan) for plan in itertools.product(*problem.groups)]
        feasible = [plan for plan in plans if problem.feasible(as_choice(problem, plan))]
        feasible.sort(key=lambda plan: problem.objective(as_choice(problem, plan)))
        clock = Clock(30)
        search = LocalSearch(problem, seed=0, clock=clock)
        search.offer(feasible[1])
        proof = branch_and_bound.BranchAndBound(problem, search, clock)
        proof.root()
        proof.run()
        best = problem.objective(as_choice(problem, feasible[0]))
        assert search.best_objective == pytest.approx(best, rel=1e-9)


def as_choice(problem: Problem, plan: np.typing.NDArray[np.intp]) -> np.typing.NDArray[np.bool_]:
    choice = np.zeros(len(problem.values), dtype=bool)
    choice[plan] = True
    return choice


@pytest.mark.usefixtures("only_branching")
@pytest.mark.parametrize("stage", ["_branch", "_restricted"])
def test_interrupt_never_raises_the_bound(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    # A root stopped early is certainly left open.
    monkeypatch.setattr(branch_and_bound, "ROOT", branch_and_bound.Effort(1, 5, 1, 1.0))
    instance = random_instance(0, groups=7, rows=1, kind="indefinite", tightness=0.3)
    reduced = reduce(Problem.checked(*instance.arguments))
    assert reduced is not None
    clock = Clock(30)
    search = LocalSearch(reduced.problem, seed=0, clock=clock)
    search.start()
    proof = branch_and_bound.BranchAndBound(reduced.problem, search, clock)
    proof.root()
    before = proof.bound
    assert before < proof.cutoff
    monkeypatch.setattr(branch_and_bound.BranchAndBound, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        proof.run()
    assert proof.bound == before


@settings(max_examples=15, deadline=None)
@given(random_instances())
def test_linearised_model_equals_exhaustive(instance: Instance) -> None:
    problem = Problem.checked(*instance.arguments)
    optimum = SOLVERS["exhaustive"](*instance.arguments)
    choice, bound = solve_linearised(problem, Clock(20))
    if optimum.status == "infeasible":
        assert choice is None
        assert bound == np.inf
        return
    assert choice is not None
    # CBC's own tolerance is relative to the largest coefficient.
    tolerance = 1e-6 * max(float(np.abs(problem.values).max()), abs(optimum.objective))
    assert problem.objective(choice) == pytest.approx(optimum.objective, abs=tolerance)
    assert bound <= optimum.objective + 1e-12
    assert bound >= optimum.objective - tolerance


def test_equal_seeds_give_equal_plans() -> None:
    instance = random_instance(1, groups=14, rows=2, kind="indefinite", tightness=0.4)
    first, second = (solve_iqp(*instance.arguments, seed=3) for _ in range(2))
    assert np.array_equal(first.choice, second.choice)
    assert first.objective == second.objective


@pytest.mark.usefixtures("counted_clock")
def test_time_limit_is_kept_and_the_bound_stays_valid() -> None:
    instance = random_instance(2, groups=30, rows=2, kind="indefinite", tightness=0.4)
    short = solve_iqp(*instance.arguments, time_limit=0.5)
    # The clock is looked at once per iteration, and a few times more to end.
    assert short.seconds < 0.6
    assert Problem.checked(*instance.arguments).feasible(short.choice)
    assert short.bound <= short.objective
    if short.status == "feasible":
        assert short.gap == pytest.approx((short.objective - short.bound) / max(abs(short.objective), 1e-12))
    longer = solve_iqp(*instance.arguments, time_limit=2)
    assert longer.objective <= short.objective
    assert longer.bound >= short.bound - 1e-7 * abs(short.bound)
    assert short.bound <= longer.objective


@pytest.mark.parametrize("stage", ["_branch", "_tighten"])
@pytest.mark.parametrize("calls", [1, 3])
def test_interrupt_returns_the_best_plan_with_a_valid_bound(
    monkeypatch: pytest.MonkeyPatch, stage: str, calls: int
) -> None:
    monkeypatch.setattr(branch_and_bound, "TRY_ALL", 1)
    monkeypatch.setattr(iqp, "CBC_PAIRS", 0)
    instance = random_instance(11, groups=7, rows=1, kind="indefinite", tightness=0.3)
    original = getattr(branch_and_bound.BranchAndBound, stage)
    done = []

    def interrupted(*arguments: object) -> object:
        done.append(stage)
        if len(done) >= calls:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(branch_and_bound.BranchAndBound, stage, interrupted)
    found = solve_iqp(*instance.arguments)
    monkeypatch.undo()
    assert_sound(instance, found, SOLVERS["exhaustive"](*instance.arguments))


def test_interrupt_without_any_plan_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalSearch, "start", interrupted)
    instance = random_instance(0, groups=6, rows=1, kind="convex", tightness=0.5)
    with pytest.raises(KeyboardInterrupt):
        solve_iqp(*instance.arguments)


def test_three_exchanges_leave_what_two_cannot() -> None:
    # All three groups must move together: any one or two of them alone cost 1 or 2 more.
    values = np.zeros((6, 6))
    groups = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5])]
    values[1, 1] = values[3, 3] = values[5, 5] = 1.0
    for first, second in ((1, 3), (1, 5), (3, 5)):
        values[first, second] = values[second, first] = -0.75
    problem = Problem.checked(values, groups, np.zeros((0, 6)), [])
    search = LocalSearch(problem, seed=0, clock=Clock(10))
    search.improve(np.array([0, 2, 4]))
    # 3 x 1 - 6 x 0.75 = -1.5 for three moves, 2 - 1.5 = 0.5 for two, 1 for one.
    assert search.best_objective == 0.0
    search.deepen()
    assert search.best_objective == pytest.approx(-1.5)


def test_local_search_repairs_ties_that_presolve_leaves() -> None:
    # Equal sums over three groups cannot be merged away, so exchanges have to keep the equality.
    random = np.random.default_rng(0)
    values = random.normal(size=(9, 9))
    groups = [np.arange(3 * group, 3 * group + 3) for group in range(3)]
    row = np.array([1.0, 2, 3, 1, 2, 3, -2, -4, -6])
    costs, limits = np.stack([row, -row]), np.zeros(2)
    instance = Instance(values + values.T, groups, costs, limits)
    found = solve_iqp(*instance.arguments)
    assert row @ found.choice == 0
    assert_sound(instance, found, SOLVERS["exhaustive"](*instance.arguments))


def test_presolve_merges_tied_groups_and_drops_what_never_fits() -> None:
    values = np.diag(np.arange(1.0, 8.0))
    groups = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5, 6])]
    tie = np.array([2.0, 4, -2, -4, 0, 0, 0])
    size = np.array([2.0, 4, 2, 4, 1, 1, 100])
    problem = Problem.checked(values, groups, [tie, -tie, size], [0.0, 0.0, 20.0])
    reduced = reduce(problem)
    assert reduced is not None
    assert [len(group) for group in reduced.problem.groups] == [2, 2]
    # No plan left can break a limit, so none is kept.
    assert len(reduced.problem.limits) == 0
    full = reduced.expand(np.array([False, True, True, False]))
    assert np.flatnonzero(full).tolist() == [1, 3, 4]


def test_presolve_merges_groups_tied_choice_by_choice() -> None:
    groups = [np.array([0, 1, 2]), np.array([3, 4, 5]), np.array([6, 7, 8])]
    rows = []
    for left, right in ((0, 3), (1, 4), (2, 5), (3, 6), (4, 7), (5, 8)):
        row = np.zeros(9)
        row[left], row[right] = 1.0, -1.0
        rows += [row, -row]
    reduced = reduce(Problem.checked(np.eye(9), groups, rows, np.zeros(len(rows))))
    assert reduced is not None
    assert [member.tolist() for member in reduced.members] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert np.diag(reduced.problem.values).tolist() == [3.0, 3.0, 3.0]


@needs_data
@pytest.mark.parametrize(
    ("name", "average_bits", "optimum"),
    [("resnet20_gram", 3, 2.99314505), ("resnet20_gram", 6, 0.0294877250), ("resnet20_pairs_kl", 2.5, -1.05832750)],
)
def test_sixty_binaries_are_proved(name: str, average_bits: float, optimum: float) -> None:
    instance = real_instance(name, average_bits)
    found = solve_iqp(*instance.arguments, time_limit=30)
    assert found.status == "optimal"
    assert found.objective == pytest.approx(optimum, rel=1e-6)


@needs_data
@pytest.mark.slow
@pytest.mark.usefixtures("counted_clock")
def test_resnet56_bound_after_500_looks_at_the_clock_is_close() -> None:
    """A commercial solver's gap on this one is 2000 % after a minute."""
    found = solve_iqp(*real_instance("resnet56_gram", 6).arguments, time_limit=5)
    assert found.objective == pytest.approx(0.00675494, rel=1e-5)
    assert found.gap < 0.2
