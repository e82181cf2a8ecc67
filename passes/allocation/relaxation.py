"""First-order search for good multipliers: the doubly nonnegative relaxation of one subproblem."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxquant.passes.allocation.convexify import Certificate, Lift, certify
from fxquant.passes.allocation.solution import Clock, FloatArray
from fxquant.passes.allocation.subproblem import Subproblem

# Step length of the dual update; above 1 and below the golden ratio it converges and is faster.
DUAL_STEP = 1.6
PENALTY_CHANGE = 1.3
# Small: the multipliers then move fast while the bound is still far off; `_balanced` raises it later.
START_PENALTY = 0.001


@dataclass(frozen=True)
class Warmth:
    """State of a relaxation, to continue in the same subproblem or in a restriction of it.

    Args:
        lifted: (N, N) estimate of the lifted plan's square.
        multipliers: (N, N) in the unit of the subproblem's objective.
        penalty: of the augmented Lagrangian, for the objective scaled to norm one.
    """

    lifted: FloatArray
    multipliers: FloatArray
    penalty: float

    def moved(self, transfer: FloatArray) -> Warmth:
        """Carry over to a restriction, by the matrix P of `Subproblem.restrict`."""
        # Each new coordinate is one old coordinate times a factor; folded ones only feed the constant.
        source = np.abs(transfer[:, 1:]).argmax(axis=0)
        factor = transfer[source, 1 + np.arange(len(source))]
        pick = np.concatenate([[0], source])
        stretch = np.concatenate([[1.0], 1.0 / np.maximum(factor, 1e-300)])
        lifted = np.clip(self.lifted[np.ix_(pick, pick)] * stretch[:, None] * stretch[None, :], 0.0, 1.0)
        return Warmth(lifted, transfer.T @ self.multipliers @ transfer, self.penalty)


def cold(sub: Subproblem) -> Warmth:
    """A start from the even mixture of all choices."""
    mixture = np.concatenate([[1.0], 1.0 / sub.sizes[sub.group_of], np.full(len(sub.limits), 0.5)])
    return Warmth(np.outer(mixture, mixture), np.zeros((len(mixture), len(mixture))), START_PENALTY)


@dataclass(frozen=True)
class Relaxed:
    """Result of some iterations: the certificate, where to go on, and the fractional plan (m,)."""

    certificate: Certificate
    warmth: Warmth
    plan: FloatArray


def relax(sub: Subproblem, lift: Lift, warmth: Warmth, iterations: int, clock: Clock) -> Relaxed:
    """Run some iterations of the alternating direction method and certify the bound reached.

    Splits  min <C, Y>  into Y = V R V' with R positive semidefinite, and Y with Y_00 = 1, diagonal = row
    0, zero inside groups, entries in [0, 1]; Z are the multipliers of Y = V R V' (Oliveira, Wolkowicz
    and Xu, 2018, algorithm in section 3.2). An inexact end costs tightness, never validity.

    Args:
        sub: what to bound.
        lift: its lifted form.
        warmth: where to start.
        iterations: at most this many; fewer when the clock runs out.
        clock: of the whole solve.
    """
    count = len(sub.names)
    diagonal = 1 + np.arange(count)
    multipliers = warmth.multipliers / lift.scale
    lifted, penalty, basis = warmth.lifted, warmth.penalty, lift.basis
    for iteration in range(iterations):
        # R: the projection of V'(Y + Z / penalty)V onto positive semidefinite matrices, by its eigenvalues.
        inner = basis.T @ (lifted + multipliers / penalty) @ basis
        eigenvalues, vectors = np.linalg.eigh((inner + inner.T) / 2)
        positive = eigenvalues > 0
        factor = basis @ (vectors[:, positive] * np.sqrt(eigenvalues[positive]))
        square = factor @ factor.T
        previous = lifted
        # Y: the unconstrained minimiser, then the nearest matrix with Y_00 = 1, diagonal = row 0, entries in [0, 1].
        lifted = square - (lift.objective + multipliers) / penalty
        # One diagonal and two row entries (Y is symmetric) must agree: their mean is nearest.
        chosen = np.clip((lifted[diagonal, diagonal] + 2 * lifted[0, diagonal]) / 3, 0.0, 1.0)
        np.clip(lifted, 0.0, 1.0, out=lifted)
        lifted[lift.forbidden] = 0.0
        lifted[diagonal, diagonal] = chosen
        lifted[0, diagonal] = chosen
        lifted[diagonal, 0] = chosen
        lifted[0, 0] = 1.0
        residual = lifted - square
        multipliers = multipliers + DUAL_STEP * penalty * (residual + residual.T) / 2
        # More often would follow the noise of single steps.
        if iteration % 20 == 19:
            penalty = _balanced(penalty, residual, lifted, previous, multipliers)
        if not clock.left:
            break
    certificate = certify(sub, lift, multipliers)
    return Relaxed(certificate, Warmth(lifted, multipliers * lift.scale, penalty), lifted[0, diagonal])


def _balanced(
    penalty: float, residual: FloatArray, lifted: FloatArray, previous: FloatArray, multipliers: FloatArray
) -> float:
    """Raise or lower the penalty when primal and dual residuals (relative) are three times apart."""
    primal = np.linalg.norm(residual) / (1 + np.linalg.norm(lifted))
    dual = penalty * np.linalg.norm(lifted - previous) / (1 + np.linalg.norm(multipliers))
    if primal > 3 * dual:
        return penalty * PENALTY_CHANGE
    if dual > 3 * primal:
        return penalty / PENALTY_CHANGE
    return penalty
