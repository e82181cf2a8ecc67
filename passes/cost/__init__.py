"""Cost models: one file each, every one a table over the candidates that a linear limit of the program reads."""

from __future__ import annotations

from fxquant.passes.cost import activation, average_bits, bops, size
from fxquant.passes.cost.activation import stored_bytes, worst_rows
from fxquant.passes.cost.given_latency import told_latency
from fxquant.passes.cost.handovers import HandOver, hand_overs
from fxquant.passes.cost.latency_table import LatencyModel, Observation, fit, nonnegative_least_squares
from fxquant.passes.cost.registry import COSTS, CostModel
from fxquant.passes.cost.size import FLOAT_BYTES, site_bytes

__all__ = [
    "COSTS",
    "FLOAT_BYTES",
    "CostModel",
    "HandOver",
    "LatencyModel",
    "Observation",
    "activation",
    "average_bits",
    "bops",
    "fit",
    "hand_overs",
    "nonnegative_least_squares",
    "site_bytes",
    "size",
    "stored_bytes",
    "told_latency",
    "worst_rows",
]
