"""Pre-round weights at every candidate width, for scoring before there is a plan.

Scores taken with nearest rounding overstate the cost of low widths after reconstruction. One walk through the float
network gives the moments of every site's input, which serve all widths (BRECQ, arXiv 2102.05426, likewise scores
reconstructed weights).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fxquant.core.facts import WeightGrids
from fxquant.core.host import SILENT, Reporter
from fxquant.core.ir import Program, RowGrid, Sites, WeightFormat, tensor_at
from fxquant.core.run import CalibrationSet
from fxquant.passes.base import Pass
from fxquant.passes.formats import RowProblem, find, rows_of
from fxquant.passes.rounding.closed_form.gptq import gptq_rounder
from fxquant.passes.rounding.closed_form.layerwise import gram_of
from fxquant.passes.rounding.closed_form.prefix import Prefix, go_to
from fxquant.passes.scale_weights import used_formats


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Write `WeightGrids` with every site's weight rounded at every width, on the float network's inputs.

    Args:
        images: calibration images.
        reporter: shows progress.
    """

    images: CalibrationSet = field(repr=False)
    reporter: Reporter = field(default=SILENT, repr=False)
    reads = (Sites, WeightGrids)
    writes = (WeightGrids,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with rounded weights and the grids they lie on; the graph does not change."""
        used = used_formats(program)
        sites = [site for site in program[Sites].sites if not site.stored]
        grids = {site: dict(own) for site, own in program[WeightGrids].grids.items()}
        rounded: dict[tuple[str, WeightFormat], Tensor] = {}
        walk = Prefix(program.module, self.images)
        for site in self.reporter.track(sites, "round weights in every format", len(sites)):
            _ = go_to(site.nodes[0], walk)
            gram = gram_of(site, program.module, walk)
            weight, groups = tensor_at(program.module, site.weight), len(gram)
            # Even spacing is found already; other levels are better when found under the method.
            even = {c: grid for c, grid in grids[site.name].items() if grid.levels is None}
            found = {c: RowGrid.of(grid, groups, len(weight)) for c, grid in even.items()}
            problem = RowProblem(rows_of(weight, groups=groups), gram, gptq_rounder(gram), found=found)
            for chosen in used:
                rows = find(problem, chosen)
                grids[site.name][chosen] = better = even.get(chosen) or rows.grid()
                # The product is taken in float32, as the quantizer takes it.
                rounded[site.name, chosen] = better.dequantize(problem.rounded(rows).reshape(weight.shape))
        return program.with_facts(WeightGrids(grids, rounded)), 0
