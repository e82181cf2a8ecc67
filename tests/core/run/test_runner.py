"""The runner, by way of the simplest graphs; its users' tests compare it with plain runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxquant.core.run import Runner, dependents, varying_nodes


@pytest.fixture
def nodes() -> dict[str, Node]:
    """`y = w.neg() + x; return x.relu() + y`, with a dead node."""
    graph = Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    negative = graph.call_function(torch.neg, (w,))
    y = graph.call_function(torch.add, (negative, x))
    relu = graph.call_function(torch.relu, (x,))
    graph.call_function(torch.exp, (y,), name="dead")
    graph.output(graph.call_function(torch.add, (relu,), {"other": y}, name="total"))
    return {node.name: node for node in graph.nodes}


@pytest.fixture
def runner(nodes: dict[str, Node]) -> Runner:
    root = nn.Module()
    root.register_buffer("w", torch.tensor([1.0, -2.0]))
    return Runner(GraphModule(root, nodes["x"].graph))


def test_dependents_read_a_source_directly_or_through_others(nodes: dict[str, Node]) -> None:
    found = dependents(nodes.values(), [nodes["neg"], nodes["relu"]])
    assert {node.name for node in found} == {"neg", "relu", "add", "dead", "total", "output"}
    assert [node.name for node in varying_nodes(nodes["x"].graph)] == ["add", "relu", "dead", "total"]
    assert dependents(nodes.values(), []) == set()


def test_values_go_with_their_last_reader_unless_kept(runner: Runner) -> None:
    alive: list[set[str]] = []
    x = torch.tensor([3.0, 4.0])
    values = runner.given((x,))
    runner.run(runner.steps, values, keep=lambda node: node.name == "relu", after=lambda _: alive.append(names(values)))
    assert alive == [
        {"x", "w"},
        {"x", "w", "neg"},
        {"x", "neg", "add"},
        {"x", "add", "relu"},
        {"add", "relu", "dead"},
        {"add", "relu", "total"},
        {"relu", "total", "output"},
    ]
    assert names(values) == {"relu"}
    every = runner.given((x,))
    runner.run(runner.steps, every)
    assert names(every) == set(runner.by_name)
    assert every[runner.nodes[-1]].tolist() == [5.0, 10.0]


def names(values: dict[Node, Tensor]) -> set[str]:
    return {node.name for node in values}


def test_the_base_is_read_and_not_written(runner: Runner) -> None:
    base = {runner.by_name["relu"]: torch.ones(2), runner.by_name["add"]: torch.ones(2)}
    values: dict[Node, Tensor] = {}
    runner.run([runner.by_name["total"]], values, base, {"total": lambda relu: relu * 7}, keep=lambda _: True)
    assert values[runner.by_name["total"]].tolist() == [7.0, 7.0]
    assert names(base) == {"relu", "add"}


def test_a_weight_is_read_when_it_is_used(runner: Runner) -> None:
    runner.module.w = torch.tensor([0.0, 0.0])
    values = runner.given((torch.ones(2),))
    runner.run(runner.steps, values)
    assert values[runner.nodes[-1]].tolist() == [2.0, 2.0]
