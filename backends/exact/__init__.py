"""The exact integer reference that other backends are compared with, edge by edge."""

from __future__ import annotations

from fxquant.backends.exact.edge_trace import (
    Integers,
    Trace,
    Tracer,
    edge_labels,
    lowered_tracer,
    run_traced,
    value_names,
)
from fxquant.backends.exact.integer_graph import exact_graph
from fxquant.backends.exact.requantize import REQUANTIZATIONS, Sums, requantization

__all__ = [
    "REQUANTIZATIONS",
    "Integers",
    "Sums",
    "Trace",
    "Tracer",
    "edge_labels",
    "exact_graph",
    "lowered_tracer",
    "requantization",
    "run_traced",
    "value_names",
]
