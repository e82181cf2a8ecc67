"""Rounding tasks on tiny networks, and nodes of weighted ops without an export."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import Argument

from fxquant.core.facts import BitAllocation, Rounding
from fxquant.core.ir import Choice, Grid, Program, RowGrid, Sites
from fxquant.core.run import CalibrationSet, GraphReplay
from fxquant.passes.formats import RowRounder, rows_of
from fxquant.passes.rounding import RoundingTask
from fxquant.passes.rounding.closed_form import channel_means
from tests import scoring


def images(name: str, count: int = 12) -> CalibrationSet:
    """Return seeded images of a network of `tests.scoring`."""
    return CalibrationSet(scoring.inputs(name, count))


def plan_of(program: Program, *bits: int) -> BitAllocation:
    """Return a plan that gives the sites these weight bits in turn."""
    sites = program[Sites].sites
    return BitAllocation({site.name: Choice(bits[k % len(bits)], 8) for k, site in enumerate(sites)})


def task_of(name: str, *bits: int, held_out: CalibrationSet | None = None, count: int = 12) -> RoundingTask:
    """Return the task of rounding a network of `tests.scoring` to these weight bits, site by site in turn."""
    program = scoring.calibrated(name)
    return task_on(program, images(name, count), *bits, held_out=held_out)


def task_on(
    program: Program, given: CalibrationSet, *bits: int, held_out: CalibrationSet | None = None
) -> RoundingTask:
    """Return the task of rounding a calibrated program."""
    planned = program.with_facts(plan_of(program, *bits))
    return RoundingTask(planned, given, held_out, "mse")


def after(task: RoundingTask, program: Program) -> RoundingTask:
    """Return the task of the next algorithm of a chain."""
    return replace(task, program=program)


def mean_errors(task: RoundingTask, rounding: Rounding) -> dict[str, float]:
    """Return op -> largest difference of a channel's mean, in units of the largest float mean."""
    simulated = task.simulated(rounding)
    replays = GraphReplay(simulated.module), GraphReplay(task.program.module)
    with torch.no_grad():
        ours, floats = (replay.forward(task.images.inputs)[1] for replay in replays)
    found = {}
    for name in (name for site in task.sites for name in site.nodes):
        nodes = [replay.by_name[name] for replay in replays]
        means = [channel_means([values[node]], node) for values, node in zip((ours, floats), nodes, strict=True)]
        found[name] = float((means[0] - means[1]).abs().max() / means[1].abs().max())
    return found


def op_node(op: object, x: Tensor, weight: Tensor, *rest: Argument) -> Node:
    """Return a node that calls a weighted op, with the shapes that geometry is read from."""
    graph = Graph()
    nodes = [graph.placeholder(name) for name in ("x", "weight")]
    for node, value in zip(nodes, (x, weight), strict=True):
        node.meta["val"] = value
    assert callable(op)
    made = graph.call_function(op, (*nodes, *rest))
    made.meta["val"] = op(x, weight, *rest)
    return made


def correlated(inputs: int, samples: int, seed: int, groups: int = 1) -> Tensor:
    """Return float64 ReLU features of shape (groups, samples, inputs) whose columns have much in common."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(groups, samples, max(1, inputs // 2), generator=generator, dtype=torch.float64)
    mixed = hidden @ torch.randn(groups, max(1, inputs // 2), inputs, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(groups, samples, inputs, generator=generator, dtype=torch.float64)
    return torch.relu(mixed + noise)


def on_grid(weight: Tensor, grid: Grid, groups: int, rounder: RowRounder) -> Tensor:
    """Return a weight rounded row by row, float32 of its shape, every value on the grid."""
    rows = rows_of(weight, groups=groups)
    integers = rounder(rows, RowGrid.of(grid, groups, weight.shape[0]))
    # The product is taken in float32, as the quantizer takes it.
    return grid.dequantize(integers.reshape(weight.shape))
