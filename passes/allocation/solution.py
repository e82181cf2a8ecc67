"""The allocation problem, validated once, and the solution that every solver returns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fxquant.core.errors import OptionError

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.intp]
BoolArray = NDArray[np.bool_]
Status = Literal["optimal", "feasible", "infeasible"]

# A limit counts as kept when it is exceeded by no more than this part of the row's largest possible sum:
# the sums of exact integer byte counts in float64 carry an error of about 1e-15 of it.
LIMIT_TOLERANCE = 1e-12
# An objective is proved when its bound is this close, relative to it; float64 sums cannot tell much less.
PROOF_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Solution:
    """A plan with what is proved about it.

    gap = (objective - bound) / max(|objective|, 1e-12), and 0 where the plan is proved optimal (bound
    within `PROOF_TOLERANCE` of the objective, relative; `bound` is then the objective itself).

    Args:
        choice: (n,) bool, one true entry per group; all false where the problem is infeasible.
        objective: x' values x of the plan, in the unit of `values`; inf where infeasible.
        bound: no feasible plan has an objective below this; inf where infeasible, -inf where unknown.
        status: "optimal" (proved), "feasible" (best found) or "infeasible" (proved).
        seconds: wall clock of the solve.
        notes: for the user, for example a fallback that was used.
        interrupted: Ctrl-C ended the search before the time was over.

    Raises:
        OptionError: the bound lies above the objective, or the status contradicts the figures.
    """

    choice: BoolArray
    objective: float
    bound: float
    gap: float
    status: Status
    seconds: float
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    def __post_init__(self) -> None:
        if np.isnan(self.objective) or np.isnan(self.bound) or self.bound > self.objective:
            raise OptionError(f"bound {self.bound} must not lie above the objective {self.objective}")
        if (self.status == "infeasible") != (not self.choice.any()):
            raise OptionError(f"status {self.status!r} contradicts a plan with {self.choice.sum()} choices")


@dataclass(frozen=True)
class Problem:
    """min x' values x over one-hot x with costs x <= limits, in some rows costs x + x' products x <= limits.

    `values` is stored with the entries between two choices of one group (off the diagonal) set to zero:
    x_i x_j = 0 there for every one-hot x, so they never count.

    Args:
        values: (n, n) symmetric, any unit.
        groups: one index array per one-hot group; together a partition of 0..n-1.
        costs: (k, n), one row per limit, each row in its own unit; k may be 0.
        limits: (k,), same units.
        products: row -> (n, n) symmetric, at least 0, same unit: what two choices cost together; the diagonal is
            stored with `costs`. Without it, a row is a lower bound of itself, so whatever is proved without it holds.

    Raises:
        OptionError: a wrong shape, a non-finite or unsymmetric entry, or groups that are no partition.
    """

    values: FloatArray
    groups: tuple[IndexArray, ...]
    costs: FloatArray
    limits: FloatArray
    products: Mapping[int, FloatArray] = field(default_factory=dict)
    group_of: IndexArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.values)
        if self.values.shape != (count, count) or count == 0:
            raise OptionError(f"values must be a square matrix with n >= 1, got shape {self.values.shape}")
        if self.costs.ndim != 2 or self.costs.shape[1] != count:
            raise OptionError(f"costs must have shape (k, {count}), got {self.costs.shape}")
        if self.limits.shape != (len(self.costs),):
            raise OptionError(f"limits must have shape ({len(self.costs)},), got {self.limits.shape}")
        for name, array in (("values", self.values), ("costs", self.costs), ("limits", self.limits)):
            if not np.isfinite(array).all():
                raise OptionError(f"{name} must be finite; leave a row without a limit out")
        if not np.allclose(self.values, self.values.T, rtol=1e-9, atol=1e-12 * np.abs(self.values).max()):
            raise OptionError("values must be symmetric; pass (values + values.T) / 2")
        members = np.concatenate(self.groups) if self.groups else np.empty(0, dtype=np.intp)
        if any(len(group) == 0 for group in self.groups) or not np.array_equal(np.sort(members), np.arange(count)):
            raise OptionError(f"groups must be non-empty and hold each index 0..{count - 1} exactly once")
        group_of = np.empty(count, dtype=np.intp)
        for number, group in enumerate(self.groups):
            group_of[group] = number
        masked = (self.values + self.values.T) / 2
        masked[(group_of[:, None] == group_of[None, :]) & ~np.eye(count, dtype=bool)] = 0.0
        object.__setattr__(self, "group_of", group_of)
        object.__setattr__(self, "values", masked)
        self._split_products()

    def _split_products(self) -> None:
        """Bring the products' diagonals into the costs, and leave out what two choices of one group never cost."""
        costs, kept = self.costs.copy(), dict[int, FloatArray]()
        inside = self.group_of[:, None] == self.group_of[None, :]
        for row, matrix in self.products.items():
            if matrix.shape != self.values.shape or not 0 <= row < len(costs):
                raise OptionError(f"products of row {row} have shape {matrix.shape}; {len(costs)} rows are there")
            if not np.isfinite(matrix).all() or (matrix < 0).any() or not np.allclose(matrix, matrix.T, rtol=1e-9):
                raise OptionError(f"products of row {row} must be symmetric numbers of at least 0")
            costs[row] += np.diag(matrix)
            kept[row] = np.where(inside, 0.0, matrix)
        object.__setattr__(self, "costs", costs)
        object.__setattr__(self, "products", {row: matrix for row, matrix in kept.items() if matrix.any()})

    @classmethod
    def checked(
        cls,
        values: ArrayLike,
        groups: Sequence[ArrayLike],
        costs: ArrayLike,
        limits: ArrayLike,
        products: Mapping[int, ArrayLike] | None = None,
    ) -> Problem:
        """Convert plain arrays and check them.

        Raises:
            OptionError: see the class; also entries that are no numbers.
        """
        try:
            cost_rows = np.asarray(costs, dtype=np.float64)
            matrix = np.array(values, dtype=np.float64)
            indices = tuple(_indices(group) for group in groups)
            return cls(
                values=matrix,
                groups=indices,
                # An empty list has no second axis; it means: no limits.
                costs=cost_rows if cost_rows.size or cost_rows.ndim == 2 else np.zeros((0, len(matrix))),
                limits=np.asarray(limits, dtype=np.float64).reshape(-1),
                products={row: np.asarray(each, dtype=np.float64) for row, each in (products or {}).items()},
            )
        except (TypeError, ValueError) as error:
            raise OptionError(f"values, groups, costs and limits must be arrays of numbers: {error}") from error

    @property
    def slack_unit(self) -> FloatArray:
        """Largest size a row's sum can have, (k,), at least the limit's; the scale of its tolerance."""
        reach = np.zeros(len(self.costs))
        for group in self.groups:
            reach += np.abs(self.costs[:, group]).max(axis=1)
        return np.maximum(np.maximum(reach, np.abs(self.limits)), 1e-300)

    def row_sums(self, plan: IndexArray) -> FloatArray:
        """The left side of each limit, (k,), for one chosen index per group, (groups,)."""
        sums = self.costs[:, plan].sum(axis=1)
        for row, matrix in self.products.items():
            sums[row] += matrix[np.ix_(plan, plan)].sum()
        return np.asarray(sums)

    def row_changes(self, plan: IndexArray) -> FloatArray:
        """What moving a group to each index adds to each row, (k, n), from a plan of one index per group, sorted."""
        current = plan[self.group_of]
        changes = self.costs - self.costs[:, current]
        for row, matrix in self.products.items():
            reach = matrix[:, plan].sum(axis=1)
            changes[row] += 2 * (reach - reach[current])
        return np.asarray(changes)

    def objective(self, choice: BoolArray) -> float:
        """x' values x of one plan, (n,) bool."""
        picked = np.flatnonzero(choice)
        return float(self.values[np.ix_(picked, picked)].sum())

    def feasible(self, choice: BoolArray) -> bool:
        """Whether the plan is one-hot and keeps every limit up to `LIMIT_TOLERANCE`."""
        one_hot = (np.bincount(self.group_of[choice], minlength=len(self.groups)) == 1).all()
        excess = self.row_sums(np.flatnonzero(choice)) - self.limits
        return bool(one_hot and (excess <= LIMIT_TOLERANCE * self.slack_unit).all())


class Solver(Protocol):
    """The one signature of all allocation solvers."""

    def __call__(
        self,
        values: ArrayLike,
        groups: Sequence[ArrayLike],
        costs: ArrayLike,
        limits: ArrayLike,
        *,
        time_limit: float = 60.0,
        seed: int = 0,
        products: Mapping[int, ArrayLike] | None = None,
    ) -> Solution:
        """Minimise x' values x over one-hot x with costs x + x' products x <= limits, products >= 0 by row."""
        ...


@dataclass(frozen=True)
class Clock:
    """Wall clock that starts when it is made, with the time allowed in seconds.

    Raises:
        OptionError: the time allowed is not a positive number.
    """

    allowed: float
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if not self.allowed > 0:
            raise OptionError(f"time_limit must be a positive number of seconds, got {self.allowed!r}")

    @property
    def spent(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(self.allowed - self.spent, 0.0)


def answer(
    problem: Problem,
    choice: BoolArray | None,
    bound: float,
    clock: Clock,
    notes: Sequence[str] = (),
    interrupted: bool = False,
) -> Solution:
    """Make the `Solution` of a search that ended with `choice` (None: proved infeasible) and `bound`.

    The plan counts as proved when objective - bound <= PROOF_TOLERANCE |objective|.
    """
    once = tuple(dict.fromkeys(notes))
    if choice is None:
        nothing = np.zeros(len(problem.values), dtype=bool)
        return Solution(nothing, np.inf, np.inf, 0.0, "infeasible", clock.spent, once, interrupted)
    objective = problem.objective(choice)
    if objective - bound <= proof_margin(problem, objective):
        return Solution(choice, objective, objective, 0.0, "optimal", clock.spent, once, interrupted)
    gap = (objective - bound) / max(abs(objective), 1e-12)
    return Solution(choice, objective, bound, gap, "feasible", clock.spent, once, interrupted)


def proof_margin(problem: Problem, objective: float) -> float:
    """How far a bound may stay below an objective that it proves, in the unit of `values`."""
    # The second term is what a float64 sum over the plan's entries can lose when large terms cancel.
    return PROOF_TOLERANCE * abs(objective) + 1e-14 * float(np.abs(problem.values).sum())


def _indices(group: Any) -> IndexArray:
    array = np.asarray(group)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"a group must hold integers, got {array.dtype}")
    return array.astype(np.intp).reshape(-1)
