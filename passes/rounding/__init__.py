"""Rounding algorithms: one file each, all behind one `Rounding`."""

from __future__ import annotations

from fxquant.passes.rounding import adaround, brecq, nearest, pdquant, qdrop
from fxquant.passes.rounding.registry import ROUNDERS, Rounder, RoundingTask

__all__ = ["ROUNDERS", "Rounder", "RoundingTask", "adaround", "brecq", "nearest", "pdquant", "qdrop"]
