"""Sensitivity estimators: one file each, all behind one `SensitivityMatrix`."""

from __future__ import annotations

from fxquant.passes.sensitivity import (
    coverage,
    diagonal,
    fisher,
    fisher_out,
    fit,
    gram,
    hawq,
    hybrid,
    monotone,
    mpqco,
    pairs,
    path,
    shrunk,
    sqnr,
    weight_mse,
)
from fxquant.passes.sensitivity.registry import ESTIMATORS, FLOAT_ONLY, Estimator

__all__ = [
    "ESTIMATORS",
    "FLOAT_ONLY",
    "Estimator",
    "coverage",
    "diagonal",
    "fisher",
    "fisher_out",
    "fit",
    "gram",
    "hawq",
    "hybrid",
    "monotone",
    "mpqco",
    "pairs",
    "path",
    "shrunk",
    "sqnr",
    "weight_mse",
]
