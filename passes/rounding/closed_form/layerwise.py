"""Round layer by layer in graph order, each weight for the inputs that the network quantized so far gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.core.facts import FakeQuantNodes, Rounding, WeightGrids
from fxquant.core.host import give_back
from fxquant.core.ir import RowGrid, Site, WeightFormat, resolve, tensor_at
from fxquant.passes.formats import Patches, RowProblem, RowRounder, rows_of
from fxquant.passes.rounding.closed_form.input_gram import GramAccumulator, Moments, geometry_of
from fxquant.passes.rounding.closed_form.output_moments import OutputMoments, bias_of, output_moments
from fxquant.passes.rounding.closed_form.prefix import Prefix, go_to
from fxquant.passes.rounding.registry import RoundingTask

Fit = Callable[[RowProblem, RowGrid, WeightFormat], tuple[RowGrid, Tensor]]
"""(rows, H and how they are rounded; the weight's grid; its format) -> the grid to take, and integers on it."""

Aim = Callable[[Tensor, OutputMoments], tuple[Tensor, Moments]]
"""(float weight by rows, moments with the float network's outputs) -> rows to round instead, H that weighs errors."""

RowAlgorithm = Callable[[Moments], RowRounder]
"""Moments of an op's input -> how to round weights that read it; work that all widths share is done once."""


def on_own_grid(problem: RowProblem, own: RowGrid, weight: WeightFormat) -> tuple[RowGrid, Tensor]:
    """Return the weight's own grid, and the rows rounded on it."""
    del weight
    return own, problem.rounded(own)


def round_layerwise(
    task: RoundingTask,
    algorithm: RowAlgorithm,
    title: str,
    crossed: bool = False,
    fit: Fit = on_own_grid,
    aim: Aim | None = None,
    front: Rounding | None = None,
    count: int | None = None,
) -> Rounding:
    """Return the task's rounding with every weight rounded on the network quantized up to it.

    A weight that several ops share is rounded after the inputs of all of them were seen.

    Args:
        task: the plan; biases, grids and activation ranges of earlier algorithms stay, their weights do not.
        algorithm: how rows are rounded.
        title: shown with the progress.
        crossed: whether the algorithm also needs the float network's inputs.
        fit: chooses the grid of each weight, and rounds it; by default on its own grid.
        aim: which values are rounded so that the float network's outputs are followed, where it is not the weight;
            biases are then chosen too.
        front: a rounding of the first weights, which stay as they are in it.
        count: how many weights are rounded, those of `front` included; None for all.
    """
    earlier = replace(task.rounding, weights={}) if front is None else front
    simulated = task.simulated(earlier)
    quantized = Prefix(simulated.module, task.images)
    also = crossed or aim is not None
    floating = Prefix(task.program.module, task.images, quantized.batch) if also else None
    walks = (quantized,) if floating is None else (quantized, floating)
    seen = len(task.images)
    weights, grids, biases = dict(earlier.weights), dict(earlier.grids), dict(earlier.biases)
    sites = [site for site in task.sites[:count] if site.name not in weights]
    for site in task.reporter.track(sites, title, len(sites)):
        # Values of the last layer's size are freed; those of the next are of another one.
        give_back()
        seen = min(seen, go_to(site.nodes[0], *walks))
        weight, outputs = tensor_at(task.program.module, site.weight), list[OutputMoments]()
        together = None
        if aim is None:
            moments = moments_of(site, simulated.module, quantized, floating)
            rows = floats = rows_of(weight, groups=len(moments.gram))
        else:
            assert floating is not None
            outputs = outputs_of(site, simulated.module, quantized, floating)
            floats = rows_of(weight, groups=len(outputs[0].gram))
            together = OutputMoments.together(outputs)
            rows, moments = aim(floats, together)
        plans = earlier.grid_of(site.name, task.program[WeightGrids])
        own = RowGrid.of(plans, len(rows), len(weight))
        problem = RowProblem(rows, moments.gram, algorithm(moments))
        grid, integers = fit(problem, own, task.choices[site.name].weight)
        if together is not None:
            grid, integers = _not_worse(together, grid, integers, own, own.nearest(floats))
        if grid is not own:
            grids[site.name] = plans = grid.grid()
        # The product is taken in float32, as the quantizer takes it.
        weights[site.name] = plans.dequantize(integers.reshape(weight.shape)).to(weight.device)
        # From here on the walk has the rounded weight in place of its quantizer's output.
        for name in simulated[FakeQuantNodes].weights[site.name]:
            quantized.settle(name, weights[site.name])
        for name, each in zip(site.nodes, outputs, strict=False):
            biases[name] = each.bias(rows_of(weights[site.name], groups=len(rows))).float()
            quantized.shift(name, biases[name] - bias_of(simulated, resolve(simulated.module.graph, name)).float())
    whole = len(task.images)
    notes = () if seen == whole else (f"{title} saw {seen} of {whole} images where values are largest",)
    return replace(earlier, weights=weights, grids=grids, biases=biases, notes=(*earlier.notes, *notes))


def _not_worse(
    moments: OutputMoments, grid: RowGrid, integers: Tensor, own: RowGrid, plain: Tensor
) -> tuple[RowGrid, Tensor]:
    """Return grid and integers with the rows to nearest on their own grid that follow the outputs better."""
    worse = moments.error(own.value(plain)) < moments.error(grid.value(integers))
    if not worse.any():
        return grid, integers
    chosen = grid if grid is own else grid.chosen(own, worse)
    return chosen, torch.where(worse.unsqueeze(2), plain, integers)


def outputs_of(site: Site, module: GraphModule, quantized: Prefix, floating: Prefix) -> list[OutputMoments]:
    """Return the output moments of each of a site's ops, over all images; arguments as those of `moments_of`."""
    found = []
    for position, name in enumerate(site.nodes):
        if position == 1:
            quantized, floating = quantized.ahead(), floating.ahead()
        quantized.to(name)
        floating.past(name)
        found.append(output_moments(resolve(module.graph, name), quantized.source(name), floating.value(name)))
    return found


def moments_of(site: Site, module: GraphModule, quantized: Prefix, floating: Prefix | None = None) -> Moments:
    """Return the moments of the inputs of a site's ops, over all images.

    Args:
        site: its first op is the next node of the walk, or a later one.
        module: the graph that is walked.
        quantized: the walk; a copy of it runs ahead to the site's later ops.
        floating: the walk through the float network, if its inputs are needed.
    """
    return _counted(GramAccumulator(floating is not None), site, module, quantized, floating).moments()


def gram_of(site: Site, module: GraphModule, walk: Prefix) -> Tensor | Patches:
    """Return the second moments of the inputs of a site's ops, over all images, as patches where there are few.

    Args:
        site, module, walk: as for `moments_of`.
    """
    return _counted(GramAccumulator(few=True), site, module, walk).gram()


def _counted(
    counted: GramAccumulator, site: Site, module: GraphModule, quantized: Prefix, floating: Prefix | None = None
) -> GramAccumulator:
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
    return counted
