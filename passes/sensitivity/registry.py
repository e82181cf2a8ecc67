"""The table of estimators."""

from __future__ import annotations

from collections.abc import Callable

from fxquant.core.facts import SensitivityMatrix
from fxquant.core.registry import Registry
from fxquant.passes.sensitivity.scorer import Scorer

Estimator = Callable[[Scorer], SensitivityMatrix]
"""Measures what it needs through the scorer and returns the matrix over the scorer's candidates."""

ESTIMATORS: Registry[Estimator] = Registry("estimator")
"""Name -> estimator."""

FLOAT_ONLY = frozenset({"fisher_out", "fit", "hawq", "mpqco", "path", "sqnr", "weight_mse"})
"""Estimators that are defined around the float network only, and refuse a plan as context."""
