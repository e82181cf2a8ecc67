"""Convolutions with channels last and clips computed along: the same answers, and no value in between."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.capture import capture
from fxquant.core.run import Environment, GraphReplay, Runner, clips_behind, model_outputs

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions of all kinds, behind each of them a clip or none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.point, self.grouped = nn.Conv2d(8, 16, 1, bias=False), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.twice, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.stem(x))
        y = nn.functional.hardtanh(self.depthwise(y), 0.0, 0.5)
        y = nn.functional.relu6(self.point(y))
        y = torch.relu(self.grouped(y))
        between = self.twice(y)
        last: torch.Tensor = self.last(torch.relu(between) + between)
        return last.view(len(x), -1)


@pytest.fixture(scope="module")
def module() -> GraphModule:
    torch.manual_seed(0)
    return capture(Net().eval(), (IMAGES[:2],)).module


def test_clips_that_alone_read_a_convolution_are_found(module: GraphModule) -> None:
    """Not behind small groups of channels, nor where the sum is read once more."""
    found = clips_behind(module.graph.nodes)
    assert [node.name for node in found] == ["conv2d", "conv2d_1", "conv2d_2"]
    assert [next(iter(node.users)) for node in found] == list(found.values())


def test_answers_are_the_module_s_own(module: GraphModule) -> None:
    with torch.no_grad():
        expected = module(IMAGES)
    torch.testing.assert_close(model_outputs(module, (IMAGES,)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(GraphReplay(module).forward((IMAGES,))[0], expected, rtol=1e-5, atol=1e-5)


def values_of(runner: Runner, alone: tuple[Node, ...] = ()) -> tuple[set[str], Environment]:
    """Return the names of the nodes that had values during a run, and those that are kept."""
    had: set[str] = set()
    values = Environment(runner.given((IMAGES,)))
    clips = set(runner.clips.values())
    with torch.no_grad():
        runner.run(runner.steps, values, keep=clips.__contains__, after=lambda n: had.add(n.name), alone=alone)
    return had, values


def test_a_clip_is_computed_along_where_nobody_asks_for_the_sum(module: GraphModule) -> None:
    runner = Runner(module)
    had, values = values_of(runner)
    assert {"conv2d", "conv2d_1", "conv2d_2"}.isdisjoint(had)
    assert {"conv2d_3", "conv2d_4"} <= had
    one, other = list(runner.clips)[:2]
    apart, same = values_of(runner, alone=(one,))
    assert one.name in apart
    assert other.name not in apart
    for clip in runner.clips.values():
        torch.testing.assert_close(values[clip], same[clip], rtol=1e-5, atol=1e-6)
    x = values[runner.clips[other]]
    assert float(x.min()) == 0.0
    assert float(x.max()) == 0.5


def test_a_substituted_convolution_has_its_value(module: GraphModule) -> None:
    replay = GraphReplay(module)
    with torch.no_grad():
        doubled, _ = replay.forward((IMAGES,), {"conv2d": lambda x: x.new_ones(3, 8, 8, 8)}, frozenset())
        every, _ = replay.forward((IMAGES,), {"conv2d": lambda x: x.new_ones(3, 8, 8, 8)})
        plain, _ = replay.forward((IMAGES,), kept=frozenset())
    torch.testing.assert_close(doubled, every, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(doubled, plain)


def test_gradients_are_recorded_as_before(module: GraphModule) -> None:
    x = IMAGES.clone().requires_grad_()
    answer, environment = GraphReplay(module).recorded((x,), {})
    y = IMAGES.clone().requires_grad_()
    (found,) = torch.autograd.grad(answer.sum(), x)
    (expected,) = torch.autograd.grad(module(y).sum(), y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(node in environment for node in clips_behind(module.graph.nodes))


def test_the_work_of_both_is_counted(module: GraphModule) -> None:
    costs = {node.name: 1.0 for node in module.graph.nodes if node.op == "call_function"}
    replay = GraphReplay(module, costs)
    with torch.no_grad():
        replay.forward((IMAGES,), kept=frozenset())
    assert replay.spent == len(costs)


def test_bytes_are_counted_as_values_are_held(module: GraphModule) -> None:
    """Also where gradients are on: runs that keep values have none."""
    replay = GraphReplay(module)
    assert torch.is_grad_enabled()
    named = {node.name for node, _ in replay.footprint((IMAGES,)).values}
    assert {"conv2d", "conv2d_1", "conv2d_2"}.isdisjoint(named)
    assert {next(iter(node.users)).name for node in replay.clips} <= named
    apart = replay.footprint((IMAGES,), apart=True)
    assert {"conv2d", "conv2d_1", "conv2d_2"} <= {node.name for node, _ in apart.values}
    assert apart.total > replay.footprint((IMAGES,)).total
