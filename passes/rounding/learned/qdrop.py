"""QDrop (arXiv 2203.05740): BRECQ with activations that are quantized at random while weights are learned."""

from __future__ import annotations

from fxquant.core.ir import Program
from fxquant.passes.rounding.learned.engine import reconstruct
from fxquant.passes.rounding.learned.options import Reconstruction
from fxquant.passes.rounding.registry import ROUNDERS, RoundingTask

QDROP = Reconstruction(unit="block", inputs="mixed", mix=0.5, drop=0.5)
"""Half the elements of each input and of each activation inside the block pass unrounded."""


@ROUNDERS.register("qdrop")
def qdrop(task: RoundingTask) -> Program:
    """Learn rounding directions and activation steps under random dropping of activation quantization."""
    return reconstruct(task, QDROP, "qdrop")
