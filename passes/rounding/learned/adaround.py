"""AdaRound (arXiv 2004.10568): rounding directions learned layer by layer against the float layer's output."""

from __future__ import annotations

from fxquant.core.ir import Program
from fxquant.passes.rounding.learned.engine import reconstruct
from fxquant.passes.rounding.learned.options import Reconstruction
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask

ADAROUND = Reconstruction(unit="layer", inputs="quantized", drop=0.0, step_lr=0.0)
"""Inputs from the quantized network, targets from the float one; activations stay as calibrated."""


@ROUNDERS.register("adaround")
def adaround(task: RoundingTask) -> Program:
    """Learn whether each weight goes up or down, layer by layer."""
    return reconstruct(task, ADAROUND, "adaround")
