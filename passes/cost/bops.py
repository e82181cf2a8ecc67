"""`bops`: bit operations for one sample, `sum(MACs x weight bits x activation bits)`."""

from __future__ import annotations

import numpy as np

from fxquant.core.facts import CostTable, Target
from fxquant.core.ir import FLOAT_BITS, Program, Sites
from fxquant.passes.cost.registry import COSTS


@COSTS.register("bops")
def bops(program: Program, target: Target) -> CostTable:
    """Return bit operations per candidate; the float model counts 32 x 32 bits, and only sites are counted."""
    del target
    sites = program[Sites]
    values = [sites.by_name(c.site).macs * c.choice.weight_bits * c.choice.activation_bits for c in sites.candidates]
    whole = sum(site.macs for site in sites.sites) * FLOAT_BITS**2
    return CostTable(sites.candidates, np.array(values, dtype=np.float64), 0.0, float(whole), "bit operations")
