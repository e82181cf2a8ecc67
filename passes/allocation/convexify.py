"""Exact convexification of a one-hot quadratic, and the bound that any multipliers certify.

For lifted y = (1, x, slack) every feasible plan lies in the range of a basis V (one-hot and slack
equations), its entries are in [0, 1] and its square has trace <= 1 + groups + limits. So for ANY
symmetric Z

    y' C y  =  y' (C + Z) y  -  y' Z y  >=  min_plan y' (C + Z) y  -  trace * max(0, lambda_max(V' Z V)).

The first term is bounded by choosing for every variable its best partner in every other group (one
level of the reformulation-linearization technique), the second is the convex part: -V' Z V is the
quadratic made convex by the multipliers of x_i^2 = x_i (diagonal shift), of x_i x_j = 0 inside a group
(free entries), and of the one-hot and limit equations times every variable. The best Z gives the
doubly nonnegative (semidefinite and nonnegative) bound; Oliveira, Wolkowicz and Xu, "ADMM for the SDP
relaxation of the QAP" (2018), section 3.1, has the same certificate for assignment problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxquant.passes.allocation.solution import BoolArray, FloatArray
from fxquant.passes.allocation.subproblem import Subproblem

# Relative float64 error that certificates allow for, times the sum of the sizes of their terms.
ROUNDING = 1e-13


@dataclass(frozen=True)
class Lift:
    """The lifted form of a subproblem, scaled to objective norm one.

    Args:
        objective: (N, N) with N = 1 + m + k, Frobenius norm one, constant taken out.
        scale: unit of `objective` in that of the subproblem.
        constant: the subproblem's constant, in its own unit.
        basis: (N, r) orthonormal columns; every lifted plan is in its range.
        forbidden: (N, N) pairs of choices of one group, never chosen together.
        trace: largest squared length of a lifted plan.
    """

    objective: FloatArray
    scale: float
    constant: float
    basis: FloatArray
    forbidden: BoolArray
    trace: float

    @classmethod
    def of(cls, sub: Subproblem) -> Lift:
        """Lift a subproblem with at least one group."""
        count, rows, groups = len(sub.names), len(sub.limits), len(sub.starts)
        size = 1 + count + rows
        objective = np.zeros((size, size))
        objective[: 1 + count, : 1 + count] = sub.matrix
        # The constant would only lengthen the objective that penalties are scaled by.
        objective[0, 0] = 0.0
        scale = max(float(np.linalg.norm(objective)), 1e-300)
        forbidden = np.zeros((size, size), dtype=bool)
        forbidden[1 : 1 + count, 1 : 1 + count] = sub.group_of[:, None] == sub.group_of[None, :]
        np.fill_diagonal(forbidden, False)
        equations = np.zeros((groups + rows, size))
        equations[:groups, 0] = -1.0
        equations[sub.group_of, 1 + np.arange(count)] = 1.0
        units = np.maximum(sub.units, 1e-300)
        equations[groups:, 0] = -sub.limits / units
        equations[groups:, 1 : 1 + count] = sub.costs / units[:, None]
        equations[groups:, 1 + count :] = np.eye(rows)
        # Every row has an entry the others lack (a group's own columns, a slack), so the rank is full.
        complete, _ = np.linalg.qr(equations.T, mode="complete")
        basis = np.ascontiguousarray(complete[:, groups + rows :])
        return cls(objective / scale, scale, sub.constant, basis, forbidden, 1.0 + groups + rows)


@dataclass(frozen=True)
class Certificate:
    """A proven bound and what it becomes when one more choice is fixed.

    Args:
        bound: no feasible plan is below, in the subproblem's unit, constant included.
        with_choice: (m,) no feasible plan holding this choice is below.
    """

    bound: float
    with_choice: FloatArray


def certify(sub: Subproblem, lift: Lift, multipliers: FloatArray) -> Certificate:
    """The bound that `multipliers` Z, (N, N) symmetric in the lift's unit, prove.

    See the module's formula; valid for every Z, tight for the optimal one.
    """
    count = len(sub.names)
    priced = lift.objective + multipliers
    inner = lift.basis.T @ multipliers @ lift.basis
    largest = float(np.linalg.eigvalsh((inner + inner.T) / 2)[-1]) if len(inner) else 0.0
    # Best partner of every variable in every other group: the first term of the module's formula.
    between = np.minimum.reduceat(priced[1 : 1 + count, 1 : 1 + count], sub.starts, axis=1)
    between[np.arange(count), sub.group_of] = 0.0
    # A slack lies in [0, 1]: it pays only where its price is negative.
    slack = np.minimum(priced[1 + count :, :], 0.0)
    own = np.diag(priced)[1 : 1 + count] + 2 * priced[0, 1 : 1 + count]
    alone = own + between.sum(axis=1) + 2 * slack[:, 1 : 1 + count].sum(axis=0)
    least = np.minimum.reduceat(alone, sub.starts)
    idle = 2 * slack[:, 0].sum() + slack[:, 1 + count :].sum()
    total = priced[0, 0] + least.sum() + idle - lift.trace * max(largest, 0.0)
    # What float64 may have lost must not make the bound too high.
    rounding = ROUNDING * (np.abs(multipliers).sum() + np.abs(lift.objective).sum() + lift.trace * abs(largest))
    certain = float(total - rounding)
    # Fixing a choice replaces its group's least term by its own.
    with_choice = (certain - least[sub.group_of] + alone) * lift.scale + lift.constant
    return Certificate(certain * lift.scale + lift.constant, with_choice)
