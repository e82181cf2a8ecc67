"""`average_bits`: stored bits per weight, `sum(stored bits) / sum(weights)` over the sites."""

from __future__ import annotations

import numpy as np

from fxquant.core.facts import CostTable, Target
from fxquant.core.ir import FLOAT_BITS, Program, Sites
from fxquant.passes.cost.registry import COSTS
from fxquant.passes.cost.size import stored_bits


@COSTS.register("average_bits")
def average_bits(program: Program, target: Target) -> CostTable:
    """Return each candidate's share of the average; stem and classifier count like any other site, scales do not."""
    sites = program[Sites]
    total = sum(site.weight_count for site in sites.sites)
    stored = [stored_bits(sites.by_name(c.site), c.choice, target) for c in sites.candidates]
    return CostTable(
        sites.candidates, np.array(stored, dtype=np.float64) / max(1, total), 0.0, float(FLOAT_BITS), "bits"
    )
