"""The flow from a captured program to a plan: pipeline, allocation under limits, rounding."""

from __future__ import annotations

from fxquant.flow.cheapest import check_labels, choose
from fxquant.flow.latency import measure_latency
from fxquant.flow.pipeline import KNOWN_NAMES, Pipeline, find_sites
from fxquant.flow.round_weights import ROUNDED, algorithms, realised, round_plan, round_with_feedback

__all__ = [
    "KNOWN_NAMES",
    "ROUNDED",
    "Pipeline",
    "algorithms",
    "check_labels",
    "choose",
    "find_sites",
    "measure_latency",
    "realised",
    "round_plan",
    "round_with_feedback",
]
