"""Rounding algorithms: one file each, all behind one `Rounding`."""

from __future__ import annotations

from fxquant.passes.rounding import adaround, bias_correction, brecq, equalize, gpfq, gptq, nearest, pdquant, qdrop
from fxquant.passes.rounding.registry import ROUNDERS, Rounder, RoundingTask

__all__ = [
    "ROUNDERS",
    "Rounder",
    "RoundingTask",
    "adaround",
    "bias_correction",
    "brecq",
    "equalize",
    "gpfq",
    "gptq",
    "nearest",
    "pdquant",
    "qdrop",
]
