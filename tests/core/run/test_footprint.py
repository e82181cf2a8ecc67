from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, Node

from fxquant.core.run import Footprint, live_bytes, storages


def chain(sizes: list[int]) -> Footprint:
    graph = Graph()
    nodes: list[Node] = [graph.placeholder("x")]
    for _ in sizes:
        nodes.append(graph.call_function(torch.relu, (nodes[-1],)))
    return Footprint(tuple(zip(nodes[1:], sizes, strict=True)), max(sizes, default=0))


@given(st.lists(st.integers(0, 100), min_size=1, max_size=30), st.integers(0, 600))
@settings(max_examples=100, deadline=None)
def test_what_is_kept_fits_and_nothing_more_would(sizes: list[int], limit: int) -> None:
    footprint = chain(sizes)
    kept = footprint.within(limit, {})
    if sum(sizes) <= limit:
        assert kept is None
        return
    assert kept is not None
    weight = dict(footprint.values)
    held = sum(weight[node] for node in kept)
    assert held <= limit
    assert all(held + size > limit for node, size in footprint.values if node not in kept)


def test_of_equal_values_those_kept_are_spread_over_the_graph() -> None:
    footprint = chain([10] * 40)
    kept = footprint.within(100, {})
    assert kept is not None
    places = [k for k, (node, _) in enumerate(footprint.values) if node in kept]
    gaps = [b - a for a, b in zip([-1, *places], [*places, 40], strict=True)]
    assert len(kept) == 10
    assert max(gaps) <= 8


def test_light_values_are_kept_before_heavy_ones() -> None:
    footprint = chain([50, 50, 1, 50, 50, 50, 2, 50])
    kept = footprint.within(4, {})
    assert kept == frozenset({footprint.values[2][0], footprint.values[6][0]})


def test_costly_stretches_keep_more() -> None:
    footprint = chain([10] * 20)
    costs = {node.name: 100.0 for node, _ in footprint.values[15:]}
    kept = footprint.within(60, costs)
    assert kept is not None
    assert sum(node in kept for node, _ in footprint.values[15:]) >= 4


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 3), lambda x: [{"a": x}]])
def test_storages_are_counted_once_and_inside_of_structures(wrap: object) -> None:
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    value = torch.zeros(10)
    assert callable(wrap)
    assert sum(storages({a: value, b: wrap(value[2:])}).values()) == 40
    assert storages({a: None, b: 3}) == {}


def test_values_live_until_their_last_reader() -> None:
    graph = Graph()

    def add(*inputs: Node, numbers: int) -> Node:
        node = graph.call_function(torch.relu, inputs) if inputs else graph.placeholder("x")
        node.meta["val"] = torch.empty(2, numbers, device="meta")
        return node

    x = add(numbers=10)
    wide = add(x, numbers=100)
    narrow = add(wide, numbers=1)
    weight = graph.get_attr("w")
    weight.meta["val"] = torch.empty(10**6, device="meta")
    last = add(x, narrow, weight, numbers=50)
    graph.output(last)
    # Traced with two images; x waits beside the wide value for the last op.
    assert live_bytes(graph) == 4 * (10 + 100 + 1)
    last.meta["val"] = torch.empty(2, 500, device="meta", dtype=torch.float64)
    assert live_bytes(graph) == 4 * (10 + 1) + 8 * 500
