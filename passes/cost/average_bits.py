"""`average_bits`: `sum(bits x weights) / sum(weights)` over every quantized weight."""

from __future__ import annotations

import numpy as np

from fxquant.core.facts import CostTable, Target
from fxquant.core.ir import FLOAT_BITS, Program, Sites
from fxquant.passes.cost.registry import COSTS


@COSTS.register("average_bits")
def average_bits(program: Program, target: Target) -> CostTable:
    """Return each candidate's share of the average; stem and classifier count like any other site."""
    del target
    sites = program[Sites]
    total = sum(site.weight_count for site in sites.sites)
    values = [c.choice.weight_bits * sites.by_name(c.site).weight_count / max(1, total) for c in sites.candidates]
    return CostTable(sites.candidates, np.array(values, dtype=np.float64), 0.0, float(FLOAT_BITS), "bits")
