"""`average_bits`: stored bits per weight, `sum(stored bits) / sum(weights)` over the sites."""

from __future__ import annotations

import numpy as np

from fxquant.core.facts import CostTable, Target
from fxquant.core.ir import FLOAT_BITS, MAX_BITS, Choice, Program, Site, Sites
from fxquant.passes.cost.registry import COSTS
from fxquant.passes.cost.size import stored_bits


def counted_bits(site: Site, choice: Choice, target: Target) -> float:
    """Return the stored bits of one site's weights; on a target that packs nothing, the bits of their grid."""
    if choice.is_float or min(target.storage_bits.values()) < MAX_BITS:
        return stored_bits(site, choice, target)
    # All widths would cost the same, and no limit could choose among them.
    return site.weight_count * choice.weight_bits


@COSTS.register("average_bits")
def average_bits(program: Program, target: Target) -> CostTable:
    """Return each candidate's share of the average; stem and classifier count like any other site, scales do not."""
    sites = program[Sites]
    total = sum(site.weight_count for site in sites.sites)
    counted = [counted_bits(sites.by_name(c.site), c.choice, target) for c in sites.candidates]
    return CostTable(
        sites.candidates, np.array(counted, dtype=np.float64) / max(1, total), 0.0, float(FLOAT_BITS), "bits"
    )
