"""A model of the loss of plans that every measured plan corrects."""

from __future__ import annotations

import numpy as np

from fxquant.passes.allocation.solution import BoolArray, FloatArray

TRUST = 0.5
"""Standard deviation of a candidate's true share of the loss from the modelled one, against the latter."""
FLOOR = 0.1
"""The same for candidates that the model thinks cost nothing, against the mean share of a site."""
MISFIT = 0.03
"""Standard deviation of what no sum over sites explains, against the loss of the plan."""


class LossModel:
    """`loss(x) = a x' values x + d' x`: a scale and corrections d of single candidates, by Bayesian linear regression.

    The prior of each d_i is normal around 0; a is the median of measured over modelled losses. `draw` samples d from
    what the measurements leave possible (Thompson sampling), so that a search that follows draws tries what may be good
    and learns most where it looks.

    Args:
        values: (n, n) symmetric, the model before anything was measured, in any unit.
        seed: of the draws.
    """

    def __init__(self, values: FloatArray, seed: int) -> None:
        self._values = values
        self._generator = np.random.default_rng(seed)
        self._plans: list[FloatArray] = []
        self._losses: list[float] = []

    def add(self, plan: BoolArray, loss: float) -> None:
        """Count a measured plan, (n,) bool; one whose loss is not finite says nothing."""
        if np.isfinite(loss):
            self._plans.append(plan.astype(np.float64))
            self._losses.append(loss)

    def draw(self) -> FloatArray:
        """Return `a values + diag(d)`, d drawn from the posterior (Matheron's rule)."""
        if not self._losses:
            return self._values
        plans, losses = np.array(self._plans), np.array(self._losses)
        modelled = np.einsum("ki,ij,kj->k", plans, self._values, plans)
        known = modelled > 0
        scale = float(np.median(losses[known] / modelled[known])) if known.any() else 1.0
        diagonal = np.abs(np.diag(self._values)) * scale
        share = losses.min() / max(1.0, plans[0].sum())
        deviation = TRUST * diagonal + FLOOR * share
        noise = np.maximum(MISFIT * np.abs(losses), 1e-12)
        drawn = deviation * self._generator.standard_normal(len(diagonal))
        error = noise * self._generator.standard_normal(len(losses))
        spread = plans * deviation**2
        left = losses - scale * modelled - plans @ drawn - error
        corrections = drawn + spread.T @ np.linalg.solve(spread @ plans.T + np.diag(noise**2), left)
        found: FloatArray = scale * self._values + np.diag(corrections)
        return found
