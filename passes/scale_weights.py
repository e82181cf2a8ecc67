"""Find the weight scales of every site at every candidate width, once for all plans."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.core.facts import WeightGrids
from fxquant.core.ir import Grid, Program, Sites, resolve, rule_of, tensor_at
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class ScaleWeights(Pass):
    """Write `WeightGrids`: scales of least squared error for all widths in use.

    Args:
        per_channel: one scale for each output channel; False gives all channels of a weight the same one.
    """

    per_channel: bool = True
    reads = (Sites,)
    writes = (WeightGrids,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its weight grids."""
        sites = program[Sites].sites
        # Every site at every width, so that a plan edited by hand needs no new search.
        widths = sorted({c.weight_bits for site in sites for c in site.choices if not c.is_float})
        grids: dict[str, dict[int, Grid]] = {}
        for site in sites:
            rule = rule_of(resolve(program.module.graph, site.nodes[0]))
            assert rule is not None
            weight = tensor_at(program.module, site.weight)
            grids[site.name] = {
                bits: Grid.of_weight(weight, bits, rule.channel_axis, self.per_channel) for bits in widths
            }
        return program.with_facts(WeightGrids(grids)), 0
