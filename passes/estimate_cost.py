"""Estimate what every candidate costs in bytes, bits and bit operations."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.core.cost import CostTables
from fxquant.core.edges import EdgeGroups
from fxquant.core.program import Program
from fxquant.core.spec import Sites
from fxquant.core.target import Target
from fxquant.passes.base import Pass
from fxquant.passes.cost import COSTS
from fxquant.passes.cost.told_latency import told_latency


@dataclass(frozen=True)
class EstimateCost(Pass):
    """Write `CostTables` with one table for each registered cost model, and `latency` where the target tells it.

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
            tables["latency"] = told_latency(program, self.target)
        return program.with_facts(CostTables(tables)), 0
