"""Rounding algorithms: one file each, all behind one `Rounding`."""

from __future__ import annotations

from fxquant.passes.rounding import nearest
from fxquant.passes.rounding.acceptance import accepted, rejection
from fxquant.passes.rounding.closed_form import bias_correction, equalize, gpfq, gptq
from fxquant.passes.rounding.learned import adaround, brecq, pdquant, qdrop
from fxquant.passes.rounding.registry import ROUNDERS, Rounder, RoundingTask

__all__ = [
    "ROUNDERS",
    "Rounder",
    "RoundingTask",
    "accepted",
    "adaround",
    "bias_correction",
    "brecq",
    "equalize",
    "gpfq",
    "gptq",
    "nearest",
    "pdquant",
    "qdrop",
    "rejection",
]
