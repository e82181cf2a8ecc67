"""Rounding algorithms: one file each, all behind one `Rounding`."""

from __future__ import annotations

from fxquant.passes.rounding import nearest
from fxquant.passes.rounding.registry import ROUNDERS, Rounder, RoundingTask

__all__ = ["ROUNDERS", "Rounder", "RoundingTask", "nearest"]
