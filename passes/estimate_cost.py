"""Estimate what every candidate costs in bytes, bits and bit operations."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.core.facts import CostTables, Target
from fxquant.core.ir import EdgeGroups, Program, Sites
from fxquant.passes.base import Pass
from fxquant.passes.cost import COSTS, latency_from_rows


@dataclass(frozen=True)
class EstimateCost(Pass):
    """Write `CostTables` with one table for each registered cost model, and `latency` where the target has rows for it.

    Args:
        target: says how widths are stored.
    """

    target: Target
    reads = (Sites, EdgeGroups)
    writes = (CostTables,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its costs."""
        tables = {name: model(program, self.target) for name, model in COSTS.items()}
        if self.target.latency:
            tables["latency"] = latency_from_rows(program, self.target)
        return program.with_facts(CostTables(tables)), 0
