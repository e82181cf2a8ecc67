"""Strong plans fast: exchange descents of one, two and three groups at once, with seeded kicks."""

from __future__ import annotations

import numpy as np

from fxquant.passes.allocation.lagrangian import lagrangian_plans
from fxquant.passes.allocation.solution import LIMIT_TOLERANCE, BoolArray, Clock, FloatArray, IndexArray, Problem

# Groups re-drawn by one kick; small kicks keep most of a good plan, large ones leave its basin.
KICK_SIZES = (2, 3, 4, 6, 8)
# Kicks without gain before a random restart, and such restarts in a row before the search ends.
QUIET_KICKS, RESTARTS = 60, 4


class LocalSearch:
    """Best plan found so far for one problem, improved on demand; deterministic by seed.

    A plan is held as (groups,) chosen indices. Exchanging the choices of a set S of groups changes
    x' values x by sum_{i in S} d_i + 2 sum_{i<j in S} e_ij with d the change of single exchanges and
    e_ij = v_ij - v_i,cur(j) - v_cur(i),j + v_cur(i),cur(j): all pairs at once are one matrix.

    Args:
        problem: what to minimise.
        seed: of the kicks and random starts.
        clock: of the whole solve; every method ends soon after its time is over.
    """

    def __init__(self, problem: Problem, seed: int, clock: Clock) -> None:
        self.problem, self.clock = problem, clock
        self.best: IndexArray | None = None
        self.best_objective = np.inf
        self._finish = clock.allowed
        self._random = np.random.default_rng(seed)
        self._room = problem.limits + LIMIT_TOLERANCE * problem.slack_unit
        self._unit = problem.slack_unit
        # Exchanges within one group are single moves already; a pair must touch two groups.
        self._same = problem.group_of[:, None] == problem.group_of[None, :]

    @property
    def choice(self) -> BoolArray | None:
        """The best plan as (n,) bool."""
        if self.best is None:
            return None
        choice = np.zeros(len(self.problem.values), dtype=bool)
        choice[self.best] = True
        return choice

    def within(self, seconds: float) -> None:
        """Let the methods called from now on end this many seconds from now, or with the clock."""
        self._finish = min(self.clock.spent + seconds, self.clock.allowed)

    @property
    def _left(self) -> bool:
        return self.clock.spent < self._finish

    def start(self) -> None:
        """Descend from the Lagrangian plans of the diagonal and of the row sums, and from random plans."""
        values = self.problem.values
        # The second scores charge each choice with its mean pair terms, over choices that the others might take.
        mean_group = len(values) / len(self.problem.groups)
        for scores in (np.diag(values), np.diag(values) + values.sum(axis=1) / mean_group):
            for plan in lagrangian_plans(self.problem, scores):
                # One plan at least, even after the time: without any there is no answer.
                if self.best is None or self._left:
                    self.improve(plan)
        for _ in range(4):
            if self._left:
                self.improve(self._random_plan())

    def kick(self) -> None:
        """Iterated local search from the best plan until it runs dry or the time is over."""
        quiet, restarts = 0, 0
        current, current_objective = self.best, self.best_objective
        while self._left and restarts <= RESTARTS:
            before = self.best_objective
            if current is None or quiet >= QUIET_KICKS:
                plan, quiet, restarts = self._random_plan(), 0, restarts + 1
                current_objective = np.inf
            else:
                plan = current.copy()
                size = min(int(self._random.choice(KICK_SIZES)), len(plan))
                for group in self._random.choice(len(plan), size, replace=False):
                    plan[group] = self._random.choice(self.problem.groups[group])
            plan, objective = self.improve(plan)
            # Equal plans are accepted, so that the search drifts over plateaus instead of staying at one end.
            if objective <= current_objective:
                quiet = 0 if objective < current_objective else quiet + 1
                current, current_objective = plan, objective
            else:
                quiet += 1
            # Three exchanges are dear: only a new best plan is worth them.
            if self.best_objective < before and self.best is not None:
                self.deepen()
                current, current_objective, restarts = self.best, self.best_objective, 0

    def deepen(self) -> None:
        """Exchanges of three groups on the best plan until none helps or the time is over."""
        improved = self.best is not None and len(self.problem.groups) >= 3
        while improved and self._left:
            improved = False
            base = self.best
            assert base is not None
            # One exchange is forced and the best pair is sought on top of it: that covers all triples.
            for index in self._random.permutation(len(self.problem.values)):
                group = self.problem.group_of[index]
                if base[group] == index:
                    continue
                trial = base.copy()
                trial[group] = index
                move = self._best_pair(trial, self.best_objective, frozen=int(group))
                if move is not None:
                    self.improve(move)
                    improved = True
                    break
                if not self._left:
                    return

    def offer(self, plan: IndexArray) -> None:
        """Remember a feasible plan, (groups,) chosen indices sorted by group, if it is the best."""
        objective = self._objective(plan)
        if objective < self.best_objective:
            self.best, self.best_objective = plan, objective

    def improve(self, plan: IndexArray) -> tuple[IndexArray, float]:
        """Repair a plan, descend by exchanges of one and two groups, remember it; inf where not repaired."""
        repaired = self._repair(plan.copy())
        if repaired is None:
            return plan, np.inf
        objective = self._objective(repaired)
        while self._left:
            moved = self._best_pair(repaired, objective, frozen=None)
            if moved is None:
                break
            repaired = moved
            objective = self._objective(repaired)
        if objective < self.best_objective:
            self.best, self.best_objective = repaired, objective
        return repaired, objective

    def _objective(self, plan: IndexArray) -> float:
        return float(self.problem.values[np.ix_(plan, plan)].sum())

    def _random_plan(self) -> IndexArray:
        return np.array([self._random.choice(group) for group in self.problem.groups], dtype=np.intp)

    def _single(self, plan: IndexArray) -> tuple[FloatArray, FloatArray, IndexArray]:
        """Change of the objective (n,), of each row's sum (k, n), by moving to each index; its current (n,)."""
        values = self.problem.values
        current = plan[self.problem.group_of]
        reach = values[:, plan].sum(axis=1)
        diagonal = np.diag(values)
        # Entries inside a group are zero, so `reach` of a current choice holds its own diagonal, others none.
        alone = 2 * reach + diagonal
        alone[plan] -= 2 * diagonal[plan]
        return alone - alone[current], self.problem.row_changes(plan), current

    def _best_pair(self, plan: IndexArray, target: float, frozen: int | None) -> IndexArray | None:
        """The best plan within two exchanges that beats `target`, the frozen group left alone."""
        values = self.problem.values
        single, cost, current = self._single(plan)
        # Moving to the current index changes nothing, so pairs with it cover the single exchanges.
        from_current = values[current]
        change = single[:, None] + single[None, :]
        # e_ij of the class docstring for all pairs at once.
        change += 2 * (values - from_current - from_current.T + from_current[:, current])
        free = self._room - self.problem.row_sums(plan)
        for number, (row, room) in enumerate(zip(cost, free, strict=True)):
            change[row[:, None] + row[None, :] + self._together(number, current) > room] = np.inf
        # Off the diagonal two choices of one group exclude each other; the diagonal holds the single exchanges.
        change[self._same & ~np.eye(len(values), dtype=bool)] = np.inf
        np.fill_diagonal(change, np.where((cost <= free[:, None]).all(axis=0), single, np.inf))
        # The frozen group has already moved; moving it back would undo what is being tried.
        if frozen is not None:
            members = self.problem.groups[frozen]
            others = np.setdiff1d(members, plan[[frozen]])
            change[others, :] = np.inf
            change[:, others] = np.inf
        first, second = np.unravel_index(int(change.argmin()), change.shape)
        start = target if frozen is None else self._objective(plan)
        # A gain within rounding errors would let two plans be exchanged for ever.
        slack = 1e-12 * max(abs(target), abs(start))
        if not start + change[first, second] < target - slack:
            return None
        moved = plan.copy()
        moved[self.problem.group_of[first]] = first
        moved[self.problem.group_of[second]] = second
        return moved

    def _together(self, row: int, current: IndexArray) -> FloatArray | float:
        """What two exchanges at once add to a row beyond their sum, (n, n); 0 for a row without products."""
        matrix = self.problem.products.get(row)
        if matrix is None:
            return 0.0
        from_current = matrix[current]
        return np.asarray(2 * (matrix - from_current - from_current.T + from_current[:, current]))

    def _repair(self, plan: IndexArray) -> IndexArray | None:
        """Exchanges of one or two groups that reduce the total violation most, least objective first."""
        if not len(self._room):
            return plan
        values = self.problem.values
        while True:
            single, cost, current = self._single(plan)
            excess = self.problem.row_sums(plan) - self._room
            if (excess <= 0).all():
                return plan
            now = float((np.maximum(excess, 0) / self._unit).sum())
            after = (np.maximum(excess[:, None] + cost, 0) / self._unit[:, None]).sum(axis=0)
            helps = after < now * (1 - 1e-12)
            if helps.any():
                # Violation removed per objective paid, as in the greedy algorithms for knapsacks.
                price = np.where(helps, (single - single.min() + 1e-12) / np.maximum(now - after, 1e-300), np.inf)
                index = int(price.argmin())
                plan[self.problem.group_of[index]] = index
                continue
            # No single exchange helps, as with ties: two groups have to move together.
            both = np.zeros_like(values)
            for number, (row, over, unit) in enumerate(zip(cost, excess, self._unit, strict=True)):
                added = row[:, None] + row[None, :] + self._together(number, current)
                both += np.maximum(over + added, 0) / unit
            both[self._same] = np.inf
            first, second = np.unravel_index(int(both.argmin()), both.shape)
            if not both[first, second] < now * (1 - 1e-12):
                return None
            plan[self.problem.group_of[first]] = first
            plan[self.problem.group_of[second]] = second
