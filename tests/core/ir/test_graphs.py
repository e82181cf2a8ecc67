from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from fxquant.core.errors import PipelineError
from fxquant.core.ir import (
    Edge,
    constant,
    consumers,
    edges_between,
    erase_dead,
    finish,
    fork,
    insert_after,
    resolve,
    set_module,
    set_parameter,
    show,
    tensor_at,
    trace_line,
)
from tests.models import MODELS
from tests.programs import captured, folded


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Thrice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * x


def two_inputs() -> GraphModule:
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    both = graph.call_function(torch.add, (a, a))
    graph.output(graph.call_function(torch.mul, (both, graph.call_function(torch.sub, (b, a)))))
    return GraphModule(nn.Module(), graph)


def test_fork_shares_tensors_and_nothing_else() -> None:
    module = captured("residual").module
    copy = fork(module)
    assert show(copy) == show(module)
    assert [n.name for n in copy.graph.nodes] == [n.name for n in module.graph.nodes]
    assert copy.get_parameter("conv1.weight") is module.get_parameter("conv1.weight")
    conv = resolve(copy.graph, "conv2d")
    assert conv.meta["val"].shape == resolve(module.graph, "conv2d").meta["val"].shape
    before = show(module)
    erase = resolve(copy.graph, "linear")
    erase.replace_all_uses_with(resolve(copy.graph, "mean"))
    erase_dead(copy)
    conv = next(node for node in copy.graph.nodes if str(node.target).startswith("aten.conv"))
    set_parameter(copy, conv, 2, "new_bias", torch.zeros(1), trainable=True)
    assert show(module) == before
    assert not hasattr(module, "new_bias")
    assert tensor_at(copy, "new_bias").requires_grad
    assert conv.args[2] is resolve(copy.graph, "new_bias")


def test_insert_on_one_edge_of_several() -> None:
    module = two_inputs()
    graph = module.graph
    node = insert_after(module, resolve(graph, "a"), "twice_a", Twice(), [resolve(graph, "add")])
    finish(module)
    assert show(module).splitlines() == [
        "a = a()",
        "b = b()",
        "twice_a = Twice(a)",
        f"add = {ADD}(twice_a)",
        f"sub = {SUB}(b, a)",
        f"mul = {MUL}(add, sub)",
        "return mul",
    ]
    assert node.name == "twice_a"
    # (2a + 2a) (b - a): the inserted module stands behind the last input and in both slots of the add.
    assert float(module(torch.tensor(1.0), torch.tensor(3.0))) == 8.0


ADD, SUB, MUL = str(torch.add), str(torch.sub), str(torch.mul)


def test_a_name_that_is_taken_gets_a_number() -> None:
    module = two_inputs()
    graph = module.graph
    insert_after(module, resolve(graph, "add"), "q", Twice(), [resolve(graph, "mul")])
    shared = Thrice()
    insert_after(module, resolve(graph, "sub"), "q", shared, [resolve(graph, "mul")])
    insert_after(module, resolve(graph, "b"), "q_1", shared, [resolve(graph, "sub")])
    finish(module)
    assert type(module.get_submodule("q")) is Twice
    assert module.get_submodule("q_1") is shared
    assert float(module(torch.tensor(1.0), torch.tensor(2.0))) == (2 * 2) * 3 * (3 * 2 - 1)


def test_edges_count_inputs_not_arguments() -> None:
    graph = two_inputs().graph
    assert edges_between(resolve(graph, "a"), resolve(graph, "add")) == [Edge("a", "add", 0)]
    assert edges_between(resolve(graph, "a"), resolve(graph, "sub")) == [Edge("a", "sub", 1)]
    assert edges_between(resolve(graph, "b"), resolve(graph, "add")) == []
    assert [n.name for n in consumers(resolve(graph, "a"))] == ["add", "sub"]


def test_dead_nodes_go_with_what_only_they_read() -> None:
    module = two_inputs()
    with module.graph.inserting_after(resolve(module.graph, "sub")):
        one = module.graph.call_function(torch.neg, (resolve(module.graph, "sub"),))
    with module.graph.inserting_after(one):
        module.graph.call_function(torch.neg, (one,))
    assert erase_dead(module) == 2
    assert erase_dead(module) == 0


def test_names_and_paths_that_are_gone() -> None:
    module = two_inputs()
    with pytest.raises(PipelineError, match="no node 'conv'; a fact from another graph"):
        resolve(module.graph, "conv")
    with pytest.raises(PipelineError, match=r"no tensor at 'conv\.weight'"):
        tensor_at(module, "conv.weight")
    with pytest.raises(PipelineError, match="no tensor at 'training'"):
        tensor_at(module, "training")


def test_constants_are_parameters_and_buffers() -> None:
    program = captured("residual")
    graph = program.module.graph
    conv, norm = resolve(graph, "conv2d"), resolve(graph, "_native_batch_norm_legit_no_training")
    weight, mean = constant(program.module, conv.args[1]), constant(program.module, norm.args[3])
    assert weight is not None
    assert weight.shape == (8, 3, 3, 3)
    assert not weight.requires_grad
    assert mean is not None
    assert constant(program.module, conv.args[0]) is None
    assert constant(program.module, None) is None


def test_modules_at_dotted_paths() -> None:
    root = nn.Module()
    set_module(root, "a.b.c", Twice())
    set_module(root, "a.b.d", Thrice())
    assert isinstance(root.get_submodule("a.b.c"), Twice)
    assert isinstance(root.get_submodule("a.b.d"), Thrice)


def test_show_is_one_line_per_computed_node() -> None:
    assert show(folded("tokens").module) == (
        "ids = ids()\n"
        "embedding = embedding.default(out.weight, ids)\n"
        "mean = mean.dim(embedding)\n"
        "linear = linear.default(mean, fc.weight, fc.bias)\n"
        "relu = relu.default(linear)\n"
        "linear_1 = linear.default(relu, out.weight)\n"
        "return linear_1"
    )


def test_nodes_know_the_users_line() -> None:
    conv = resolve(captured("residual").module.graph, "conv2d")
    assert re.search(r"^\w+\.py:\d+: .*self\.bn1\(self\.conv1\(x\)\)", trace_line(conv))
    assert trace_line(resolve(two_inputs().graph, "a")) == "a"


@pytest.mark.parametrize("name", list(MODELS))
def test_a_fork_runs_like_the_original(name: str) -> None:
    inputs = MODELS[name].inputs(3)
    module = captured(name).module
    one, other = module(*inputs), fork(module)(*inputs)
    for a, b in zip(torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(other), strict=True):
        assert torch.equal(a, b)
