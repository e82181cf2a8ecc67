"""`average_bits`: stored bits per weight, `sum(stored bits) / sum(weights)` over the sites."""

from __future__ import annotations

import numpy as np

from fxquant.core.facts import CostTable, Target
from fxquant.core.ir import FLOAT_BITS, MAX_BITS, Candidate, Program, Sites
from fxquant.passes.cost.registry import COSTS
from fxquant.passes.cost.size import shortest_bytes, stored_bits


def counted_bits(program: Program, candidate: Candidate, target: Target) -> float:
    """Return the stored bits of one candidate's weights.

    Evenly spaced levels count their width, so that a limit of 4 bits allows 4 bits everywhere, whatever the last byte
    or a narrow row takes; other kinds count what their integers take with the tables of levels. On a target that packs
    nothing a width counts as itself.
    """
    site, choice = program[Sites].by_name(candidate.site), candidate.choice
    if not choice.is_float and min(target.storage_bits.values()) == MAX_BITS:
        # All widths would cost the same, and no limit could choose among them.
        return site.weight_count * choice.weight_bits
    packed = None if choice.kind == "uniform" else shortest_bytes(program, candidate, target)
    return stored_bits(site, choice, target) if packed is None else 8.0 * packed


@COSTS.register("average_bits")
def average_bits(program: Program, target: Target) -> CostTable:
    """Return each candidate's share of the average; stem and classifier count like any other site, scales do not."""
    sites = program[Sites]
    total = sum(site.weight_count for site in sites.sites)
    counted = [counted_bits(program, candidate, target) for candidate in sites.candidates]
    return CostTable(
        sites.candidates, np.array(counted, dtype=np.float64) / max(1, total), 0.0, float(FLOAT_BITS), "bits"
    )
