"""Round layer by layer in graph order, each weight for the inputs that the network quantized so far gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor
from torch.fx import GraphModule

from fxquant.core.facts import FakeQuantNodes, Rounding, WeightGrids
from fxquant.core.ir import Grid, RowGrid, Site, resolve, tensor_at
from fxquant.passes.formats import RowProblem, RowRounder, rows_of
from fxquant.passes.rounding.closed_form.input_gram import GramAccumulator, Moments, geometry_of
from fxquant.passes.rounding.closed_form.prefix import Prefix, fitting
from fxquant.passes.rounding.registry import RoundingTask

Regrid = Callable[[RowProblem, RowGrid], RowGrid]
"""(weight, H and how it will be rounded; its grid) -> the grid to round it on."""

RowAlgorithm = Callable[[Moments], RowRounder]
"""Moments of an op's input -> how to round weights that read it; work that all widths share is done once."""


def on_grid(weight: Tensor, grid: Grid, groups: int, rounder: RowRounder) -> Tensor:
    """Return a weight rounded row by row, float32 of its shape, every value on the grid."""
    rows = rows_of(weight, groups=groups)
    integers = rounder(rows, RowGrid.of(grid, groups, weight.shape[0]))
    # The product is taken in float32, as the quantizer takes it.
    return grid.dequantize(integers.reshape(weight.shape))


def round_layerwise(
    task: RoundingTask, algorithm: RowAlgorithm, title: str, crossed: bool = False, regrid: Regrid | None = None
) -> Rounding:
    """Return the task's rounding with every weight rounded on the network quantized up to it.

    A weight that several ops share is rounded after the inputs of all of them were seen.

    Args:
        task: the plan; biases, grids and activation ranges of earlier algorithms stay, their weights do not.
        algorithm: how rows are rounded.
        title: shown with the progress.
        crossed: whether the algorithm also needs the float network's inputs.
        regrid: chooses a grid for each weight; None keeps its grid.
    """
    earlier = replace(task.rounding, weights={})
    simulated = task.simulated(earlier)
    images = fitting(simulated.module, task.images)
    quantized = Prefix(simulated.module, images)
    floating = Prefix(task.program.module, images) if crossed else None
    weights: dict[str, Tensor] = {}
    grids = dict(earlier.grids)
    for site in task.reporter.track(task.sites, title, len(task.sites)):
        quantized.to(site.nodes[0])
        moments = moments_of(site, simulated.module, quantized, floating)
        weight = tensor_at(task.program.module, site.weight)
        rounder, grid = algorithm(moments), earlier.grid_of(site.name, task.program[WeightGrids])
        if regrid is not None:
            problem = RowProblem(rows_of(weight, groups=len(moments.gram)), moments.gram, rounder)
            grids[site.name] = grid = regrid(problem, RowGrid.of(grid, len(moments.gram), len(weight))).grid()
        weights[site.name] = on_grid(weight, grid, len(moments.gram), rounder).to(weight.device)
        # From here on the walk has the rounded weight in place of its quantizer's output.
        for name in simulated[FakeQuantNodes].weights[site.name]:
            quantized.settle(name, weights[site.name])
    notes = () if len(images) == len(task.images) else (f"{title} saw {len(images)} of {len(task.images)} images",)
    return replace(earlier, weights=weights, grids=grids, notes=(*earlier.notes, *notes))


def moments_of(site: Site, module: GraphModule, quantized: Prefix, floating: Prefix | None = None) -> Moments:
    """Return the moments of the inputs of a site's ops, over all images.

    Args:
        site: its first op is the next node of the walk, or a later one.
        module: the graph that is walked.
        quantized: the walk; a copy of it runs ahead to the site's later ops.
        floating: the walk through the float network, if its inputs are needed.
    """
    counted = GramAccumulator(floating is not None)
    for position, name in enumerate(site.nodes):
        if position == 1:
            # Later ops depend on the first one's weight, which is not rounded yet: a copy of the walk goes there.
            quantized, floating = quantized.ahead(), None if floating is None else floating.ahead()
        quantized.to(name)
        if floating is not None:
            floating.to(name)
        geometry = geometry_of(resolve(module.graph, name))
        references = [None] * len(quantized.source(name)) if floating is None else floating.source(name)
        for x, reference in zip(quantized.source(name), references, strict=True):
            counted.add(x, geometry, reference)
    return counted.moments()
