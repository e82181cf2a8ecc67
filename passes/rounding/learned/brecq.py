"""BRECQ (arXiv 2102.05426): rounding directions and activation steps learned block by block."""

from __future__ import annotations

from fxquant.core.ir import Program
from fxquant.passes.rounding.learned.engine import reconstruct
from fxquant.passes.rounding.learned.options import Reconstruction
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask

BRECQ = Reconstruction(unit="block", inputs="quantized", drop=0.0)
"""Squared error of the block's output, as its authors run it; steps are learned along with the directions."""


@ROUNDERS.register("brecq")
def brecq(task: RoundingTask) -> Program:
    """Learn rounding directions and activation steps together, block by block."""
    return reconstruct(task, BRECQ, "brecq")
