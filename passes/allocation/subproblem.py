"""What is left of a problem after some choices are fixed or excluded, in lifted form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fxquant.passes.allocation.solution import LIMIT_TOLERANCE, BoolArray, FloatArray, IndexArray, Problem


@dataclass(frozen=True)
class Subproblem:
    """min y' matrix y over y = (1, x), x one-hot in contiguous groups, costs x <= limits.

    Row and column 0 of `matrix` hold the constant and half the linear terms that fixed choices leave.

    Args:
        matrix: (m+1, m+1) symmetric; entries between two choices of one group are zero.
        starts: (g,) first variable of each group, increasing from 0.
        costs: (k, m).
        limits: (k,), tolerance included, so that every plan counted feasible keeps them exactly.
        names: (m,) which variable of the full problem each one is.
        chosen: variables of the full problem that are fixed to one.
        products: row -> (m, m), what two free choices cost together, at least 0; with one of them fixed it is in
            `costs`.
    """

    matrix: FloatArray
    starts: IndexArray
    costs: FloatArray
    limits: FloatArray
    names: IndexArray
    chosen: IndexArray
    products: Mapping[int, FloatArray] = field(default_factory=dict)

    @classmethod
    def whole(cls, problem: Problem) -> Subproblem:
        """Nothing fixed; the problem's groups must be contiguous and in order, as `presolve` leaves them."""
        count = len(problem.values)
        matrix = np.zeros((count + 1, count + 1))
        matrix[1:, 1:] = problem.values
        starts = np.array([group[0] for group in problem.groups], dtype=np.intp)
        limits = problem.limits + LIMIT_TOLERANCE * problem.slack_unit
        nothing = np.empty(0, dtype=np.intp)
        names = np.arange(count, dtype=np.intp)
        return cls(matrix, starts, problem.costs, limits, names, nothing, problem.products)

    @cached_property
    def sizes(self) -> IndexArray:
        """Choices per group, (g,)."""
        return np.diff(np.append(self.starts, len(self.names)))

    @cached_property
    def group_of(self) -> IndexArray:
        """Group of each variable, (m,)."""
        return np.repeat(np.arange(len(self.starts)), self.sizes)

    @cached_property
    def units(self) -> FloatArray:
        """Largest slack each limit can have, (k,): the limit less the cheapest plan; >0 or infeasible."""
        return np.asarray(self.limits - self.least.sum(axis=1))

    @cached_property
    def least(self) -> FloatArray:
        """Smallest cost in each group, (k, g)."""
        if not len(self.starts):
            return np.zeros((len(self.costs), 0))
        return np.asarray(np.minimum.reduceat(self.costs, self.starts, axis=1))

    def fits(self) -> BoolArray:
        """Which choices keep the limits with all other groups at their cheapest, (m,)."""
        extra = self.costs - self.least[:, self.group_of]
        return np.asarray((extra <= self.units[:, None]).all(axis=0))

    def restrict(self, keep: BoolArray) -> tuple[Subproblem, FloatArray] | None:
        """Drop the other choices; fold groups left with one choice into the constant and linear terms.

        Returns None where a group is left empty or a limit cannot be kept; else the smaller subproblem
        and the matrix P, (1+m+k, 1+m'+k), with old lifted vector = P new lifted vector, where lifted
        means (1, x, slack / units).
        """
        smaller, columns = self, np.arange(len(self.names))
        # Fixing a group can make choices of others impossible, and those again fix groups.
        while True:
            counts = np.add.reduceat(keep.astype(np.intp), smaller.starts) if len(smaller.starts) else keep[:0]
            if (counts == 0).any():
                return None
            folded = keep & (counts[smaller.group_of] == 1)
            kept = keep & ~folded
            fold = np.zeros((1 + len(smaller.names), 1 + int(kept.sum())))
            fold[0, 0] = 1.0
            fold[1 + np.flatnonzero(folded), 0] = 1.0
            fold[1 + np.flatnonzero(kept), 1 + np.arange(fold.shape[1] - 1)] = 1.0
            group_sizes = counts[counts > 1]
            costs, limits, products = smaller._folded_rows(kept, folded)
            following = Subproblem(
                matrix=fold.T @ smaller.matrix @ fold,
                starts=np.concatenate([[0], np.cumsum(group_sizes)[:-1]]).astype(np.intp)
                if len(group_sizes)
                else np.empty(0, dtype=np.intp),
                costs=costs,
                limits=limits,
                names=smaller.names[kept],
                chosen=np.concatenate([smaller.chosen, smaller.names[folded]]),
                products=products,
            )
            columns = columns[kept]
            if (following.units < 0).any():
                return None
            smaller, keep = following, following.fits()
            if keep.all():
                return smaller, self._transfer(smaller, columns)

    def _folded_rows(self, kept: BoolArray, folded: BoolArray) -> tuple[FloatArray, FloatArray, dict[int, FloatArray]]:
        """Costs, limits and products of what is kept, once the folded choices are fixed."""
        costs, limits = self.costs[:, kept], self.limits - self.costs[:, folded].sum(axis=1)
        products: dict[int, FloatArray] = {}
        for row, matrix in self.products.items():
            # Products with a fixed choice are linear from now on.
            costs[row] += 2 * matrix[np.ix_(kept, folded)].sum(axis=1)
            limits[row] -= matrix[np.ix_(folded, folded)].sum()
            if (rest := matrix[np.ix_(kept, kept)]).any():
                products[row] = rest
        return costs, limits, products

    def _transfer(self, smaller: Subproblem, columns: IndexArray) -> FloatArray:
        """The matrix P of `restrict`; `columns` says which old variable each new one is."""
        old, new, rows = len(self.names), len(smaller.names), len(self.limits)
        transfer = np.zeros((1 + old + rows, 1 + new + rows))
        transfer[0, 0] = 1.0
        transfer[1 + np.flatnonzero(np.isin(self.names, smaller.chosen)), 0] = 1.0
        transfer[1 + columns, 1 + np.arange(new)] = 1.0
        scale = smaller.units / np.maximum(self.units, 1e-300)
        transfer[1 + old + np.arange(rows), 1 + new + np.arange(rows)] = scale
        return transfer

    def problem(self) -> Problem:
        """The same program as a plain `Problem`, constant left out (`constant`), linear terms on the diagonal."""
        values = self.matrix[1:, 1:] + 2 * np.diag(self.matrix[0, 1:])
        ends = np.append(self.starts[1:], len(self.names))
        groups = tuple(np.arange(start, end) for start, end in zip(self.starts, ends, strict=True))
        return Problem(values, groups, self.costs, self.limits, self.products)

    @property
    def constant(self) -> float:
        """What the fixed choices cost by themselves."""
        return float(self.matrix[0, 0])

    def full_plan(self, picked: IndexArray) -> IndexArray:
        """All chosen variables of the full problem for a plan of this one, sorted."""
        return np.sort(np.concatenate([self.chosen, self.names[picked]]))
