"""Find the weight grids of every site in every candidate format, once for all plans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from fxquant.core.facts import WeightGrids
from fxquant.core.ir import Grid, Program, Sites, WeightFormat, resolve, rule_of, tensor_at
from fxquant.passes.base import Pass
from fxquant.passes.formats import RowProblem, grid_of, rows_of

EVEN = "uniform"
"""Kind of the formats of evenly spaced levels."""


@dataclass(frozen=True)
class ScaleWeights(Pass):
    """Write `WeightGrids`: grids of least squared error for all formats in use.

    Args:
        per_channel: one scale for each output channel; False gives all channels of a weight the same one.
        known: grids that need not be found, and the weights rounded on them.
        formats: those to find grids for; None for all in use.
        even_only: leave other levels to `RoundWeights`, which finds them under its own rounding, but for weights that
            are only stored.
    """

    per_channel: bool = True
    known: WeightGrids = field(default=WeightGrids({}), repr=False)
    even_only: bool = False
    formats: tuple[WeightFormat, ...] | None = None
    reads = (Sites,)
    writes = (WeightGrids,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its weight grids."""
        sites, used = program[Sites].sites, self.formats or used_formats(program)
        grids: dict[str, dict[WeightFormat, Grid]] = {}
        for site, axis in zip(sites, channel_axes(program).values(), strict=True):
            known = self.known.grids.get(site.name, {})
            weight, left = tensor_at(program.module, site.weight), [each for each in used if each not in known]
            if self.even_only and not site.stored:
                left = [each for each in left if each.kind == EVEN]
            grids[site.name] = {**known, **weight_grids(weight, left, axis, self.per_channel)}
        return program.with_facts(WeightGrids(grids, self.known.rounded)), 0


def used_formats(program: Program) -> list[WeightFormat]:
    """Return the formats that any site may have: every site has a grid in each, so that a plan edited by hand needs no
    new search."""
    choices = (choice for site in program[Sites].sites for choice in site.choices)
    return sorted({choice.weight for choice in choices if not choice.is_float})


def channel_axes(program: Program) -> dict[str, int]:
    """Return site -> axis of its weight that counts output channels."""
    rules = {site.name: rule_of(resolve(program.module.graph, site.nodes[0])) for site in program[Sites].sites}
    # What only stores its weight, as a table does, has a row for each channel.
    return {name: 0 if rule is None else rule.channel_axis for name, rule in rules.items()}


def weight_grids(
    weight: Tensor, used: Iterable[WeightFormat], channel_axis: int = 0, per_channel: bool = True
) -> dict[WeightFormat, Grid]:
    """Return format -> grid of a weight, of least squared error of nearest rounding."""
    if not per_channel:
        return {each: Grid.of_weight(weight, int(each.bits), channel_axis, per_channel) for each in used}
    problem = RowProblem(rows_of(weight, channel_axis))
    return {each: grid_of(problem, each, channel_axis) for each in used}
