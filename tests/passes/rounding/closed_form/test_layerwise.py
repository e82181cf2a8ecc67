"""The walk shared by GPTQ and GPFQ: what each layer's moments are taken of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from fxquant.core.facts import WeightGrids
from fxquant.core.ir import Grid, RowGrid, resolve, tensor_at
from fxquant.core.run import GraphReplay
from fxquant.passes.formats import RowRounder
from fxquant.passes.rounding.closed_form import (
    GramAccumulator,
    Moments,
    geometry_of,
    gptq_rows,
    round_layerwise,
)
from tests.passes.rounding.tasks import on_grid, task_of


def nearest(rows: Tensor, grid: RowGrid) -> Tensor:
    return grid.nearest(rows)


def downwards(rows: Tensor, grid: RowGrid) -> Tensor:
    """Round down, which no other algorithm does."""
    return (torch.floor(rows / grid.scale) + grid.zero_point).clamp(grid.spec.qmin, grid.spec.qmax)


def source(node: Node) -> Node:
    found = node.args[0]
    assert isinstance(found, Node)
    return found


def test_nearest_rows_are_the_quantizers_values() -> None:
    weight = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    grid = Grid.of_weight(weight, 4)
    plain = grid.round_trip(weight)
    assert torch.equal(on_grid(weight, grid, 2, nearest), plain)
    lower = on_grid(weight, grid, 2, downwards)
    assert torch.equal(grid.round_trip(lower), lower)
    assert (lower <= plain).all()


@pytest.mark.parametrize("crossed", [False, True])
def test_each_layer_sees_the_network_rounded_in_front_of_it(crossed: bool) -> None:
    task = task_of("plain", 4, 2)
    seen: list[Moments] = []

    def prepare(moments: Moments) -> RowRounder:
        seen.append(moments)
        return downwards

    found = round_layerwise(task, prepare, "test", crossed)
    assert list(found.weights) == [site.name for site in task.sites]
    done = task.simulated(found)
    replays = GraphReplay(done.module), GraphReplay(task.program.module)
    with torch.no_grad():
        ours, floats = (replay.forward(task.images.inputs)[1] for replay in replays)
    for site, moments in zip(task.sites, seen, strict=True):
        nodes = [resolve(program.module.graph, site.nodes[0]) for program in (done, task.program)]
        x, f = ours[source(nodes[0])], floats[source(nodes[1])]
        wanted = GramAccumulator(crossed)
        wanted.add(x, geometry_of(nodes[0]), f if crossed else None)
        assert torch.allclose(moments.gram, wanted.moments().gram, rtol=1e-4, atol=1e-4)
        assert torch.allclose(moments.cross, wanted.moments().cross, rtol=1e-4, atol=1e-4)
        assert torch.equal(moments.cross, moments.gram) != crossed


@pytest.mark.parametrize("name", ["shared", "woven"])
def test_ops_that_share_a_weight_are_counted_together(name: str) -> None:
    task = task_of(name, 4)
    seen: list[Moments] = []

    def prepare(moments: Moments) -> RowRounder:
        seen.append(moments)
        return nearest

    found = round_layerwise(task, prepare, "test")
    done = task.simulated(found)
    with torch.no_grad():
        _, values = GraphReplay(done.module).forward(task.images.inputs)
    shared = [k for k, site in enumerate(task.sites) if len(site.nodes) > 1]
    assert shared
    for k in shared:
        wanted = GramAccumulator()
        for op in task.sites[k].nodes:
            node = resolve(done.module.graph, op)
            wanted.add(values[source(node)], geometry_of(node))
        # The second op read the unrounded rest of the network: here nearest rounding, the same as what was chosen.
        assert torch.allclose(seen[k].gram, wanted.moments().gram, rtol=1e-4, atol=1e-4)


def test_a_front_that_is_rounded_stays_and_the_rest_is_rounded_behind_it() -> None:
    task = task_of("plain", 2)
    whole = round_layerwise(task, gptq_rows, "whole")
    front = round_layerwise(task, gptq_rows, "front", count=2)
    assert list(front.weights) == [site.name for site in task.sites[:2]]
    done = round_layerwise(task, gptq_rows, "rest", front=front)
    assert list(done.weights) == [site.name for site in task.sites]
    for name, weight in whole.weights.items():
        assert torch.equal(done.weights[name], weight), name
    # With another front, what is behind it sees other inputs.
    zeros = replace(front, weights={name: torch.zeros_like(weight) for name, weight in front.weights.items()})
    other = round_layerwise(task, gptq_rows, "rest", front=zeros)
    last = task.sites[-1].name
    assert all(not other.weights[name].any() for name in front.weights)
    assert not torch.equal(other.weights[last], whole.weights[last])


def test_mixed_widths_and_grids_of_earlier_algorithms_are_kept() -> None:
    task = task_of("plain", 2, 8)
    site = task.sites[0]
    own = task.rounding.grid_of(site.name, task.program[WeightGrids])
    coarse = replace(own, scale=own.scale * 3)
    earlier = replace(task.rounding, grids={site.name: coarse}, biases={"conv2d": torch.ones(6)})
    tuned = replace(task, program=task.program.with_facts(earlier))
    found = round_layerwise(tuned, lambda _: nearest, "test")
    assert found.grids == {site.name: coarse}
    assert set(found.biases) == {"conv2d"}
    for k, each in enumerate(task.sites):
        grid = coarse if k == 0 else task.rounding.grid_of(each.name, task.program[WeightGrids])
        assert grid.spec.bits == (2, 8)[k % 2]
        weight = tensor_at(task.program.module, each.weight).detach()
        assert torch.equal(found.weights[each.name], grid.round_trip(weight))
