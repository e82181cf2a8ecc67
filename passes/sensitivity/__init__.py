"""Sensitivity estimators: one file each, all behind one `SensitivityMatrix`."""

from __future__ import annotations

from fxquant.passes.sensitivity import (
    diagonal,
    fisher,
    fisher_out,
    fit,
    gram,
    hawq,
    hybrid,
    mpqco,
    pairs,
    path,
    sqnr,
    weight_mse,
)
from fxquant.passes.sensitivity.registry import ESTIMATORS, Estimator

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "diagonal",
    "fisher",
    "fisher_out",
    "fit",
    "gram",
    "hawq",
    "hybrid",
    "mpqco",
    "pairs",
    "path",
    "sqnr",
    "weight_mse",
]
