from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxquant.core.errors import CaptureError
from fxquant.core.run import GraphReplay, Substitution, answer_graph, first_tensor, model_outputs, storages
from tests.models import MODELS
from tests.programs import folded

NETS = ["residual", "concat", "attention", "two_inputs", "shared"]


def computed(replay: GraphReplay) -> list[str]:
    """Return the nodes whose first input has the shape of their output: any function can be substituted for them."""
    names = []
    for node in replay.nodes:
        source: Any = node.args[0] if node.args else None
        ours = node.meta.get("val")
        theirs = source.meta.get("val") if hasattr(source, "meta") else None
        alike = isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.shape == theirs.shape
        if node.op == "call_function" and alike:
            names.append(node.name)
    return names


def shrink(seed: int) -> Callable[[Tensor], Tensor]:
    factor = 1.0 - 0.1 * (1 + seed % 5)
    return lambda x: torch.round(x * factor * 16) / 16


def pick(names: list[str], seed: int) -> Substitution:
    chance = random.Random(seed)
    return {name: shrink(chance.randrange(99)) for name in chance.sample(names, chance.randint(0, min(4, len(names))))}


@given(st.sampled_from(NETS), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_replay_is_a_whole_run_bit_for_bit(name: str, seed: int) -> None:
    replay = GraphReplay(folded(name).module)
    inputs = MODELS[name].inputs(2)
    with torch.no_grad():
        _, base = replay.forward(inputs)
        substitution = pick(computed(replay), seed)
        answer, _ = replay.replay(base, substitution)
        whole, _ = replay.forward(inputs, substitution)
    assert torch.equal(answer, whole)


@given(st.sampled_from(NETS), st.lists(st.integers(0, 10**6), min_size=2, max_size=4))
@settings(max_examples=30, deadline=None)
def test_chained_replays(name: str, seeds: list[int]) -> None:
    replay = GraphReplay(folded(name).module)
    inputs = MODELS[name].inputs(2)
    with torch.no_grad():
        _, environment = replay.forward(inputs)
        before: Substitution = {}
        for seed in seeds:
            now = pick(computed(replay), seed)
            # What was substituted before and is not any more has changed, too.
            answer, environment = replay.replay(environment, now, changed={*before, *now}, keep=True)
            whole, whole_environment = replay.forward(inputs, now)
            assert torch.equal(answer, whole)
            before = now
    for node, value in whole_environment.items():
        if isinstance(value, Tensor):
            assert torch.equal(environment[node], value), node.name


@pytest.mark.parametrize("name", NETS)
def test_a_replay_leaves_its_base_alone(name: str) -> None:
    replay = GraphReplay(folded(name).module)
    with torch.no_grad():
        answer, base = replay.forward(MODELS[name].inputs(2))
        before = dict(base)
        same, kept = replay.replay(base, {}, keep=True)
        replay.replay(base, pick(computed(replay), 3))
    assert torch.equal(same, answer)
    assert kept == before == base or all(kept[node] is before[node] is base[node] for node in before)


def test_only_what_changed_is_run_and_charged() -> None:
    module = folded("residual").module
    costs = {node.name: 1.0 for node in module.graph.nodes if node.op == "call_function"}
    replay = GraphReplay(module, costs)
    with torch.no_grad():
        _, base = replay.forward(MODELS["residual"].inputs(2))
        assert replay.spent == len(costs)
        replay.replay(base, {"silu": torch.relu})
        # silu, the add behind it, the mean and the linear layer; not the convolution beside it
        assert replay.spent == len(costs) + 4
        replay.replay(base, {})
        assert replay.spent == len(costs) + 4
        # Without kept values every value is missing, and each is computed once.
        _, bare = replay.forward(MODELS["residual"].inputs(2), kept=frozenset())
        replay.replay(bare, {"silu": torch.relu})
    assert replay.spent == 3 * len(costs) + 4


@pytest.mark.parametrize("name", list(MODELS))
def test_a_whole_run_is_the_modules_own(name: str) -> None:
    module = folded(name).module
    inputs = MODELS[name].inputs(3)
    with torch.no_grad():
        answer, _ = GraphReplay(module).forward(inputs)
        torch.testing.assert_close(answer, first_tensor(module(*inputs)), rtol=1e-5, atol=1e-5)


def test_methods_modules_and_keywords_are_run_too() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    scaled = graph.call_module("relu", (graph.call_method("mul", (x, 2.0)),))
    graph.output({"y": graph.call_function(torch.sum, (scaled,), {"dim": 1}), "n": 3})
    root = nn.Module()
    root.relu = nn.ReLU()
    replay = GraphReplay(GraphModule(root, graph))
    x_value = torch.tensor([[1.0, -1.0]])
    answer, base = replay.forward((x_value,))
    assert answer.tolist() == [2.0]
    assert replay.replay(base, {"relu": torch.neg})[0].tolist() == [0.0]


def test_gradients_flow_through_a_replay() -> None:
    replay = GraphReplay(folded("residual").module)
    _, base = replay.forward(MODELS["residual"].inputs(2))
    factor = torch.tensor(0.5, requires_grad=True)
    answer, _ = replay.replay(base, {"silu": lambda x: x * factor})
    (gradient,) = torch.autograd.grad(answer.sum(), factor)
    assert float(gradient) != 0.0


@pytest.mark.parametrize(
    "output", [torch.ones(2), (torch.ones(2), 3), [None, {"a": torch.ones(2)}], {"n": 1, "y": (torch.ones(2),)}]
)
def test_the_answer_is_the_first_tensor(output: object) -> None:
    assert first_tensor(output).tolist() == [1.0, 1.0]
    with pytest.raises(CaptureError, match="without a tensor; return a tensor, tuple or dict"):
        first_tensor([None, {"n": 3}, (), "text"])


@pytest.mark.parametrize("name", ["concat", "two_inputs"])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_answers_over_many_images_do_not_depend_on_batches(name: str, batch: int) -> None:
    module, inputs = folded(name).module, MODELS[name].inputs(5)
    expected = first_tensor(answer_graph(module)(*inputs))
    assert torch.allclose(model_outputs(module, inputs, batch), expected, atol=1e-6)


class Alive:
    """Bytes of the storages that nodes made and that still exist."""

    def __init__(self, replay: GraphReplay, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: dict[int, int] = {}
        self.peak = 0
        run = replay.value_of

        def watched(node: Node, fetch: Callable[[Node], Any], substitution: Substitution) -> Any:
            value = run(node, fetch, substitution)
            for tensor in (value if isinstance(value, tuple | list) else [value]) if node in self.counted else []:
                if isinstance(tensor, Tensor):
                    self.watch(tensor.untyped_storage())
            return value

        self.counted = {node for node in replay.nodes if node not in replay._always}
        self.given: set[int] = set()
        monkeypatch.setattr(replay, "value_of", watched)

    def watch(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address not in self.sizes and address not in self.given:
            self.sizes[address] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, address)
            self.peak = max(self.peak, sum(self.sizes.values()))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_what_does_not_fit_is_computed_again_to_the_same_bits(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, inputs = folded(name).module, MODELS[name].inputs(2)
    whole, part = GraphReplay(module), GraphReplay(module)
    footprint = part.footprint(inputs)
    assert part.spent == 0
    limit = int(share * footprint.total)
    kept = footprint.within(limit, {})
    assert kept is not None
    alive = Alive(part, monkeypatch)
    alive.given = {t.untyped_storage().data_ptr() for t in (*inputs, *module.state_dict().values())}
    # Rounding in place of a view makes a value of its own.
    slack = max(size for _, size in footprint.values)
    with torch.no_grad():
        answer, base = part.forward(inputs, kept=kept)
        expected, everything = whole.forward(inputs)
        assert torch.equal(answer, expected)
        assert alive.peak <= limit + footprint.working
        answers = sum(storages({part.nodes[-1]: base[part.nodes[-1]]}).values())
        alive.peak = 0
        for seed in range(6):
            first, second = pick(computed(part), seed), pick(computed(part), seed + 100)
            _, one = part.replay(base, first, keep=True)
            _, other = whole.replay(everything, first, keep=True)
            both = {**first, **second}
            assert torch.equal(part.replay(one, both, second)[0], whole.replay(other, both, second)[0])
            assert torch.equal(part.replay(base, second)[0], whole.replay(everything, second)[0])
            assert alive.sizes
            # Two environments are held now, each with the answer of its run.
            assert sum(alive.sizes.values()) <= 2 * (limit + answers) + slack
            del one
        assert alive.peak <= 2 * (limit + answers) + footprint.working + slack
    assert set(base) <= kept | part._always


def test_a_dropped_value_is_computed_under_the_substitution_it_had() -> None:
    replay, inputs = GraphReplay(folded("residual").module), MODELS["residual"].inputs(2)
    with torch.no_grad():
        _, plan = replay.forward(inputs, {"relu": shrink(3)}, kept=frozenset())
        found, _ = replay.replay(plan, {"relu": shrink(3), "silu": torch.relu}, changed=["silu"])
        # Not saying again what the base had changes nothing: only `changed` differs from it.
        again, _ = replay.replay(plan, {"silu": torch.relu})
        expected, _ = replay.forward(inputs, {"relu": shrink(3), "silu": torch.relu})
        without, _ = replay.forward(inputs, {"silu": torch.relu})
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert not torch.equal(found, without)


def test_a_long_chain_needs_no_recursion() -> None:
    graph = Graph()
    node = graph.placeholder("x")
    for _ in range(3000):
        node = graph.call_function(torch.add, (node, 1.0))
    graph.output(node)
    replay = GraphReplay(GraphModule(nn.Module(), graph))
    with torch.no_grad():
        answer, base = replay.forward((torch.zeros(1),), kept=frozenset())
        last, _ = replay.replay(base, {node.name: torch.neg})
    assert answer.tolist() == [3000.0]
    assert last.tolist() == [-2999.0]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_weights_are_rounded_once_for_all_batches(batch: int) -> None:
    calls: list[str] = []

    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("rounded")
            return x / 2

    program = folded("residual")
    module, inputs = deepcopy(program.module), MODELS["residual"].inputs(8)
    expected = model_outputs(module, inputs, batch)
    module.add_submodule("halved", Halved())
    conv = next(node for node in module.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    weight = conv.args[1]
    with module.graph.inserting_after(weight):
        halved = module.graph.call_module("halved", (weight,))
    conv.update_arg(1, halved)
    with module.graph.inserting_after(conv):
        doubled = module.graph.call_function(torch.mul, (conv, 2.0))
    conv.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    bias = conv.args[2]
    assert bias is None or isinstance(bias, Node)
    if isinstance(bias, Node):
        with module.graph.inserting_after(bias):
            conv.update_arg(2, module.graph.call_module("halved", (bias,)))
    module.recompile()
    assert torch.allclose(model_outputs(module, inputs, batch), expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == (1 if bias is None else 2)
