"""Find the weight grids of every site in every candidate format, once for all plans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from fxquant.core.facts import WeightGrids
from fxquant.core.ir import Grid, Program, Sites, WeightFormat, resolve, rule_of, tensor_at
from fxquant.passes.base import Pass
from fxquant.passes.formats import RowProblem, grid_of, rows_of


@dataclass(frozen=True)
class ScaleWeights(Pass):
    """Write `WeightGrids`: grids of least squared error for all formats in use.

    Args:
        per_channel: one scale for each output channel; False gives all channels of a weight the same one.
    """

    per_channel: bool = True
    reads = (Sites,)
    writes = (WeightGrids,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its weight grids."""
        sites = program[Sites].sites
        # Every site in every format, so that a plan edited by hand needs no new search.
        used = sorted({choice.weight for site in sites for choice in site.choices if not choice.is_float})
        grids: dict[str, dict[WeightFormat, Grid]] = {}
        for site in sites:
            rule = rule_of(resolve(program.module.graph, site.nodes[0]))
            axis = 0 if rule is None else rule.channel_axis
            grids[site.name] = weight_grids(tensor_at(program.module, site.weight), used, axis, self.per_channel)
        return program.with_facts(WeightGrids(grids)), 0


def weight_grids(
    weight: Tensor, used: Iterable[WeightFormat], channel_axis: int = 0, per_channel: bool = True
) -> dict[WeightFormat, Grid]:
    """Return format -> grid of a weight, of least squared error of nearest rounding."""
    if not per_channel:
        return {each: Grid.of_weight(weight, int(each.bits), channel_axis, per_channel) for each in used}
    problem = RowProblem(rows_of(weight, channel_axis))
    return {each: grid_of(problem, each, channel_axis) for each in used}
