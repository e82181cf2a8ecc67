"""Find the weight scales of every site at every candidate width, once for all plans."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fxquant.core.facts import WeightGrid, WeightGrids
from fxquant.core.ir import Program, QuantSpec, Sites, resolve, rule_of, tensor_at, weight_parameters, weight_spec
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
        grids: dict[str, dict[int, WeightGrid]] = {}
        for site in sites:
            rule = rule_of(resolve(program.module.graph, site.nodes[0]))
            assert rule is not None
            specs = [weight_spec(bits, rule.channel_axis) for bits in widths]
            weight = tensor_at(program.module, site.weight)
            grids[site.name] = {spec.bits: WeightGrid(spec, *self._parameters(weight, spec)) for spec in specs}
        return program.with_facts(WeightGrids(grids)), 0

    def _parameters(self, weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        if self.per_channel:
            return weight_parameters(weight, spec)
        # One channel of everything; kept in the shape of per-channel grids, so that all that reads them serves both.
        scale, zero_point = weight_parameters(weight.reshape(1, -1), replace(spec, channel_axis=0))
        channels = weight.shape[spec.channel_axis or 0]
        return scale.expand(channels).clone(), zero_point.expand(channels).clone()
