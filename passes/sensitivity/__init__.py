"""Sensitivity estimators: one file each, all behind one `SensitivityMatrix`."""

from __future__ import annotations

from fxquant.passes.sensitivity import diagonal, fisher, gram, pairs
from fxquant.passes.sensitivity.registry import ESTIMATORS, Estimator

__all__ = ["ESTIMATORS", "Estimator", "diagonal", "fisher", "gram", "pairs"]
