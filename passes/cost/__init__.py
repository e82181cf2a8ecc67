"""Cost models: one file each, every one a table over the candidates that a linear limit of the program reads."""

from __future__ import annotations

from fxquant.passes.cost import activation, average_bits, bops, size
from fxquant.passes.cost.registry import COSTS, CostModel

__all__ = ["COSTS", "CostModel", "activation", "average_bits", "bops", "size"]
