from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.core.errors import CaptureError
from fxquant.dynamo import DynamoGraph, caller_arguments, free_batch
from tests.models import MODELS, built


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs_of(
    model: Callable[..., Any], inputs: Sequence[object], dynamic: bool | None = None
) -> list[tuple[DynamoGraph, tuple[Any, ...]]]:
    """Return what torch.compile passes for a model, each graph with the arguments of its first call."""
    found: list[tuple[DynamoGraph, tuple[Any, ...]]] = []

    def backend(graph: GraphModule, examples: Sequence[object]) -> Callable[..., Any]:
        source = DynamoGraph(graph, examples)

        def run(*arguments: Any) -> Any:
            found.append((source, arguments))
            return graph(*arguments)

        return run

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    return found


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["residual", "shared", "two_inputs", "attention", "functional"])
def test_a_graph_becomes_a_module_with_the_users_names(name: str, dynamic: bool | None) -> None:
    model, x = built(name), MODELS[name].inputs(3)
    ((source, arguments),) = graphs_of(model, x, dynamic)
    assert source.refusal is None
    module = source.bind(arguments)
    assert [t.shape for t in source.inputs(arguments)] == [t.shape for t in x]
    with torch.no_grad():
        for one, other in zip(
            module(*source.inputs(arguments)), torch.utils._pytree.tree_leaves(model(*x)), strict=True
        ):
            torch.testing.assert_close(one, other)
    assert set(dict(module.named_parameters())) <= set(model.state_dict())
    assert set(source.weights(arguments)) <= set(model.state_dict())
    assert all(model.get_parameter(path) is parameter for path, parameter in module.named_parameters())


def test_numbers_are_put_in_as_they_are_at_the_call() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor, self.times = 0.5, 3

        def forward(self, x: Tensor, shift: float) -> Tensor:
            return (x * self.factor + shift).repeat(self.times, 1)

    ((source, arguments),) = graphs_of(Scaled(), (torch.ones(2, 4), 2.0), True)
    assert {2.0, 0.5} <= set(source.numbers(arguments))
    (made,) = source.bind(arguments)(torch.ones(5, 4))
    assert torch.equal(made, torch.full((15, 4), 2.5))


def test_two_models_with_layers_of_one_name_are_kept_apart() -> None:
    first, second = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(3, 4)
    ((source, arguments),) = graphs_of(lambda x: second(first(x)), (x,))
    module = source.bind(arguments)
    assert len(dict(module.named_parameters())) == 4
    assert torch.equal(module(x)[0], second(first(x)))


X = torch.ones(2, 1, 3, 4)
TRAINING: list[Callable[[bool], Callable[[Tensor], Tensor]]] = [
    lambda on: lambda x: torch.dropout(x, 0.5, on) + 1,
    lambda on: lambda x: F.dropout(x, 0.5, on) + 1,
    lambda on: lambda x: F.alpha_dropout(x, 0.5, on) + 1,
    lambda on: lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.5 * on) + 1,
    lambda on: nn.BatchNorm2d(1).train(on),
]


@pytest.mark.parametrize("make", TRAINING)
@pytest.mark.parametrize("on", [True, False])
def test_training_is_seen(make: Callable[[bool], Callable[[Tensor], Tensor]], on: bool) -> None:
    ((source, _),) = graphs_of(make(on), (X,))
    assert ("training mode" in str(source.refusal)) == on


def test_a_graph_without_tensors_to_read_is_refused() -> None:
    weight = nn.Parameter(torch.ones(3))
    ((source, _),) = graphs_of(lambda: weight * 2, ())
    assert source.refusal == "it reads no tensor that could hold images"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_written_into_reshapes_is_taken_out(batch: int) -> None:
    model = built("attention")
    ((source, arguments),) = graphs_of(model, MODELS["attention"].inputs(batch))
    module, more = source.bind(arguments), MODELS["attention"].inputs(8)
    freed = free_batch(module, source.inputs(arguments), more)
    with torch.no_grad():
        torch.testing.assert_close(freed(*more)[0], model(*more))
        with pytest.raises(RuntimeError):
            module(*more)


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x.reshape(x.shape[0] * 2, -1).relu(),
        # Two groups of two: with two images, the groups look like the batch.
        lambda x: x.t().reshape(2, -1).cumsum(1),
    ],
)
def test_a_graph_for_one_batch_only_says_so(model: Callable[[Tensor], Tensor]) -> None:
    ((source, arguments),) = graphs_of(model, (torch.randn(2, 4),))
    with pytest.raises(CaptureError, match=r"made for 2 images and does not serve 5 .*; give torch.compile dynamic=T"):
        free_batch(source.bind(arguments), source.inputs(arguments), (torch.arange(24.0).reshape(6, 4),))


def test_the_front_graph_is_distinguished_from_those_behind_a_break() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            torch._dynamo.graph_break()
            return x * 2

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, second: Tensor, first: Tensor) -> Tensor:
            x: Tensor = self.inner(first * second)
            return x.relu()

    seen: list[tuple[str, ...] | None] = []

    def backend(graph: GraphModule, examples: Sequence[object]) -> Callable[..., Any]:
        del examples

        def run(*arguments: Any) -> Any:
            seen.append(caller_arguments())
            return graph(*arguments)

        # As if it were written where graphs are compiled.
        return FunctionType(run.__code__, {**globals(), "__name__": "fxquant.dynamo.backend"}, closure=run.__closure__)

    torch.compile(Outer(), backend=backend)(torch.ones(3), torch.ones(3))
    assert len(seen) == 4
    assert seen == [("self", "second", "first"), None, None, None]
    assert caller_arguments() is None, "outside of torch.compile"
