"""A walk through a network gives the values of a plain run, and what is settled reaches what comes behind it."""

from __future__ import annotations

import pytest
import torch

from fxquant.core.facts import FakeQuantNodes
from fxquant.core.ir import Sites, images_axis, tensor_at
from fxquant.core.run import GraphReplay
from fxquant.passes.rounding.closed_form import FEWEST, Prefix, go_to
from tests.passes.rounding.tasks import images, task_of


@pytest.mark.parametrize("name", ["plain", "woven", "attention", "two_inputs"])
def test_the_walk_gives_a_plain_runs_values(name: str) -> None:
    task = task_of(name, 4)
    simulated = task.simulated()
    replay = GraphReplay(simulated.module)
    with torch.no_grad():
        _, plain = replay.forward(task.images.inputs)
    # Attention folds images and tokens into one axis, where batches do not stand behind one another.
    batch = 12 if name == "attention" else 5
    walk = Prefix(simulated.module, task.images, batch)
    ops = {name for site in simulated[Sites].sites for name in site.nodes}
    for node in simulated.module.graph.nodes:
        if node.name not in ops:
            continue
        walk.to(node.name)
        source = node.args[0]
        assert torch.allclose(torch.cat(walk.source(node.name), images_axis(source) or 0), plain[source], atol=1e-5)
        walk.past(node.name)
        found = walk.value(node.name)
        assert len(found) == -(-12 // batch)
        assert torch.allclose(torch.cat(found, images_axis(node) or 0), plain[node], atol=1e-5)


def test_only_values_still_to_be_read_are_kept() -> None:
    task = task_of("plain", 4)
    walk = Prefix(task.program.module, task.images)
    last = task.sites[-1].nodes[0]
    walk.to(last)
    varying = {n for n in walk._values[0] if n.op not in ("get_attr", "placeholder")}
    position = {node: k for k, node in enumerate(walk.module.graph.nodes)}
    stop = position[next(n for n in position if n.name == last)]
    assert varying
    assert all(any(position[user] >= stop for user in node.users) for node in varying)


def test_a_settled_weight_reaches_what_comes_behind_it_but_not_another_walk() -> None:
    task = task_of("plain", 4)
    simulated = task.simulated()
    first, last = task.sites[0], task.sites[-1]
    walk = Prefix(simulated.module, images("plain"))
    walk.to(first.nodes[0])
    ahead = walk.ahead()
    ahead.to(last.nodes[0])
    for name in simulated[FakeQuantNodes].weights[first.name]:
        walk.settle(name, torch.zeros_like(dict(task.program.module.named_parameters())[first.weight]))
    walk.past(first.nodes[0])
    bias = dict(simulated.module.named_parameters())["conv1.bias"]
    assert torch.allclose(walk.value(first.nodes[0])[0][0, :, 0, 0], bias)
    walk.to(last.nodes[0])
    assert not torch.equal(walk.source(last.nodes[0])[0], ahead.source(last.nodes[0])[0])


def test_changed_values_are_read_by_what_comes_behind() -> None:
    task = task_of("plain", 4)
    walk = Prefix(task.program.module, task.images)
    walk.past(task.sites[0].nodes[0])
    other = walk.ahead()
    walk.change(task.sites[0].nodes[0], lambda y: y + 1)
    last = task.sites[-1].nodes[0]
    for step in (walk, other):
        step.to(last)
    assert not torch.equal(walk.source(last)[0], other.source(last)[0])


def test_few_images_are_walked_with_where_values_are_large_and_all_where_they_are_small() -> None:
    task = task_of("plain", 4)
    simulated, given = task.simulated(), images("plain", 40)
    quantized = simulated.module
    working = GraphReplay(quantized).footprint(given.slice(0, 1).inputs).working
    walks = [Prefix(quantized, given, 4, limit=12 * working), Prefix(task.program.module, given, 4, limit=12 * working)]
    whole = [Prefix(quantized, given, 4), Prefix(task.program.module, given, 4)]
    counts = []
    for site in task.sites:
        name = site.nodes[0]
        counts.append(go_to(name, *walks))
        assert [sum(walk.batches) for walk in walks] == [counts[-1]] * 2
        for each, every in zip(walks, whole, strict=True):
            every.to(name)
            for one, other in zip(each.source(name), every.source(name), strict=False):
                assert torch.equal(one, other)
        weight = torch.zeros_like(tensor_at(task.program.module, site.weight))
        for walk in (walks[0], whole[0]):
            for quantizer in simulated[FakeQuantNodes].weights[site.name]:
                walk.settle(quantizer, weight + 0.1)
        for walk in (walks[1], whole[1]):
            walk.shift(name, torch.full((len(weight),), 0.3))
            walk.past(name)
            walk.change(name, lambda y: y + 0.2)
    assert min(counts) <= 16
    assert counts[-1] == 40, "at the classifier all images have caught up"


def test_a_few_images_are_walked_with_whatever_they_take() -> None:
    task = task_of("plain", 4)
    walk = Prefix(task.program.module, images("plain", 40), limit=1)
    assert go_to(task.sites[1].nodes[0], walk) == FEWEST
    assert walk.batch == 1


def test_a_shifted_op_gives_the_shift_to_what_comes_behind_it_but_not_to_another_walk() -> None:
    task = task_of("plain", 4)
    first, last = task.sites[0].nodes[0], task.sites[-1].nodes[0]
    walk = Prefix(task.program.module, task.images)
    other = walk.ahead()
    walk.shift(first, torch.arange(6.0))
    for step in (walk, other):
        step.past(first)
    difference = walk.value(first)[0] - other.value(first)[0]
    assert torch.allclose(difference, torch.arange(6.0).reshape(1, 6, 1, 1).expand_as(difference), atol=1e-5)
    for step in (walk, other):
        step.to(last)
    assert not torch.equal(walk.source(last)[0], other.source(last)[0])
