from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule

from fxquant import flow
from fxquant.capture import capture
from fxquant.core.facts import Settings
from fxquant.core.ir import Program, Sites, resolve, show
from fxquant.passes import Canonicalize, FoldConstants
from tests.models import MODELS, Composed
from tests.programs import captured, check_pass

aten = torch.ops.aten
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def chain(*steps: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> Program:
    """Return a program that applies ops one after another."""
    graph = Graph()
    value = graph.placeholder("x")
    for op, args, kwargs in steps:
        value = graph.call_function(op, (value, *args), kwargs)
    graph.output(value)
    return Program(GraphModule(nn.Module(), graph))


@pytest.mark.parametrize("name", list(MODELS))
def test_the_answer_stays_and_a_second_run_finds_nothing(name: str) -> None:
    done = check_pass(Canonicalize(), captured(name))
    again = check_pass(Canonicalize(), done)
    assert again.log[-1].rewrites == 0
    assert show(again.module) == show(done.module)
    inputs = MODELS[name].inputs(3)
    leaves = torch.utils._pytree.tree_leaves
    for one, other in zip(leaves(captured(name).module(*inputs)), leaves(done.module(*inputs)), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_identities_and_dead_nodes_go() -> None:
    before = chain(
        (aten.clone.default, (), {}),
        (aten.slice.Tensor, (2, 0, 9223372036854775807), {}),
        (aten.relu.default, (), {}),
        (aten.dropout.default, (0.5, False), {}),
        (aten.alias.default, (), {}),
        (aten.view.default, ([2, -1],), {}),
        (aten.detach.default, (), {}),
    )
    with before.module.graph.inserting_after(resolve(before.module.graph, "relu_default")):
        before.module.graph.call_function(aten.neg.default, (resolve(before.module.graph, "relu_default"),))
    done = check_pass(Canonicalize(), before)
    assert show(done.module) == (
        "x = x()\nrelu_default = relu.default(x)\nview_default = reshape.default(relu_default)\nreturn view_default"
    )
    assert torch.equal(done.module(X), X.relu().reshape(2, -1))


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "expected"),
    [
        (aten.mean.dim, (), {"dim": [2, 3], "keepdim": True}, "([2, 3], True)"),
        (aten.slice.Tensor, (2,), {"step": 2}, "(2, None, None, 2)"),
        (aten.slice.Tensor, (2,), {"start": 1}, "(2, 1)"),
        (aten.view.default, (), {"size": [2, -1]}, "([2, -1],)"),
        (aten.softmax.int, (), {"dim": 1}, "(1,)"),
        (aten.max_pool2d.default, ([2, 2],), {"ceil_mode": True}, "([2, 2], [], [0, 0], [1, 1], True)"),
    ],
)
def test_keywords_move_into_position(
    op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], expected: str
) -> None:
    before = chain((op, args, kwargs))
    done = check_pass(Canonicalize(), before)
    node = next(n for n in done.module.graph.nodes if n.op == "call_function")
    assert not node.kwargs
    assert str(tuple(node.args[1:])) == expected
    assert done.log[-1].rewrites > 0
    assert torch.equal(done.module(X), before.module(X))


def test_keywords_without_a_position_stay() -> None:
    done = check_pass(Canonicalize(), chain((aten.gelu.default, (), {"approximate": "tanh"})))
    assert dict(resolve(done.module.graph, "gelu_default").kwargs) == {"approximate": "tanh"}
    assert done.log[-1].rewrites == 0


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.slice.Tensor, (2, 1)),
        (aten.slice.Tensor, (2, 0, 5)),
        (aten.slice.Tensor, (2, 0, 9223372036854775807, 2)),
        (aten.dropout.default, (0.5, True)),
    ],
)
def test_what_only_looks_like_an_identity_stays(op: Callable[..., Any], args: tuple[Any, ...]) -> None:
    done = check_pass(Canonicalize(), chain((op, args, {})))
    assert len(list(done.module.graph.nodes)) == 3


@pytest.mark.parametrize("sizes", [2, [1, 3], [3, 1]])
def test_parts_of_a_value_are_slices(sizes: int | list[int]) -> None:
    class Parts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, *_, last = torch.split(x, sizes, -2)
            return first.sum() * last

    x = torch.randn(3, 2, 4, 5)
    before = capture(Parts(), (x,))
    done = check_pass(Canonicalize(), before)
    assert "split" not in show(done.module)
    assert torch.equal(done.module(x), before.module(x))


def test_a_split_of_images_stays() -> None:
    class Halves(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one, other = torch.split(x, 2)
            return one + other

    x = torch.randn(4, 3)
    program = Program(torch.export.export(Halves(), (x,)).module(), {}, ())
    assert "split" in show(check_pass(Canonicalize(), program).module)


def test_padding_by_name_becomes_numbers_where_both_sides_pad_alike() -> None:
    graph = Canonicalize()(captured("padded")).module.graph
    same, even, last = (resolve(graph, f"conv2d_{i}") for i in (1, 2, 3))
    assert same.target is aten.conv2d.default
    assert same.args[4] == [2, 2], "kernel 3, dilation 2"
    assert even.target is aten.conv2d.padding
    assert even.args[4] == "same", "an even kernel pads one side more"
    assert last.target is aten.conv2d.default
    assert last.args[4] == [0, 0]
    graph = Canonicalize()(captured("sequence")).module.graph
    assert resolve(graph, "conv1d").target is aten.conv1d.default
    assert resolve(graph, "conv1d").args[4] == [2]


def projected(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Products with a parameter, as vision-language models end in, and products that are none."""
    y = torch.mm(x, net.proj) + x @ net.proj
    y = (y.unsqueeze(1).unsqueeze(1) @ net.batched).sum(dim=(1, 2))
    answer: torch.Tensor = (net.proj @ (y.t() @ y)).sum(dim=0) + y
    return answer


def test_products_with_a_parameter_are_linear_layers() -> None:
    proj, batched = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 3, 3))
    program = capture(Composed(projected, proj=proj, batched=batched), (torch.randn(2, 4),))
    done = check_pass(Canonicalize(), program)
    text = show(done.module)
    assert text.count("linear.default(x, t_default") == 2
    assert text.count("matmul.default(") == 3
    assert "mm.default(x" not in text
    x = torch.randn(5, 4)
    assert torch.allclose(done.module(x), program.module(x), rtol=1e-4, atol=1e-5)
    found = flow.find_sites(
        capture(Composed(lambda net, x: x @ net.proj, proj=proj), (torch.randn(2, 4),)), Settings(bits=(8,))
    )
    assert [site.name for site in found[Sites].sites] == ["proj"]
    assert tuple(found.module.get_parameter("proj").shape) == (3, 4)


@pytest.mark.parametrize("beta", [0, 1, 0.5])
@pytest.mark.parametrize("alpha", [1, 0.25])
def test_baddbmm_is_a_product_and_a_sum(alpha: float, beta: float) -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        matrices = net.matrix.expand(x.shape[0], -1, -1)
        one = torch.baddbmm(net.bias, x, matrices, alpha=alpha, beta=beta)
        return torch.baddbmm(x.mean(dim=(1, 2), keepdim=True), one, x.transpose(1, 2), alpha=alpha, beta=beta)

    matrix, bias = nn.Parameter(torch.randn(1, 5, 5)), nn.Parameter(torch.randn(5))
    model = Composed(forward, matrix=matrix, bias=bias)
    x = torch.randn(3, 4, 5)
    done = check_pass(FoldConstants(), check_pass(Canonicalize(), capture(model, (x,))))
    targets = [node.target for node in done.module.graph.nodes]
    assert aten.baddbmm.default not in targets
    assert [targets.count(target) for target in (aten.linear.default, aten.matmul.default)] == [1, 1]
    (linear,) = (node for node in done.module.graph.nodes if node.target is aten.linear.default)
    assert (len(linear.args) == 3) == (alpha == beta == 1)
    # With beta = 0 what is added is not read, not even where it is infinite.
    assert (aten.add.Tensor in targets) == (beta != 0)
    assert tuple(done.module.get_parameter("matrix").shape) == (5, 5)
    assert torch.allclose(done.module(x), model(x), atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4)])
@pytest.mark.parametrize(("one", "other"), [(6, 2), (2, 6), (4, 4)])
def test_bilinear_layers_are_linear_layers_of_the_wider_input(shape: tuple[int, ...], one: int, other: int) -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = net.pair(x[..., :one], x[..., -other:]) + net.bare(x[..., -one:], x[..., :other])
        return answer

    model = Composed(forward, pair=nn.Bilinear(one, other, 5), bare=nn.Bilinear(one, other, 5, bias=False))
    x = torch.randn(*shape, 7)
    done = check_pass(FoldConstants(), check_pass(Canonicalize(), capture(model, (x,))))
    assert aten.bilinear.default not in [node.target for node in done.module.graph.nodes]
    assert tuple(done.module.get_parameter("pair.weight").shape) == (5 * min(one, other), max(one, other))
    for rows in (x, x[:1]):
        assert torch.allclose(done.module(rows), model(rows), atol=1e-5)


def test_bilinear_layers_of_computed_weights_stay() -> None:
    model = Composed(lambda _, x: F.bilinear(x, x, x.mean(0).expand(2, 4, 4)))
    x = torch.randn(3, 4)
    assert "bilinear.default" in show(check_pass(Canonicalize(), capture(model, (x,))).module)


EINSUMS = {
    "bi,oi->bo": ((5,), (3, 5)),
    "b c i , i o -> b c o": ((4, 5), (5, 3)),
    "...i,oi->...o": ((4, 2, 5), (3, 5)),
    "oi,bi->bo": ((5,), (3, 5)),
    "bchw,oc->bohw": ((5, 2, 4), (3, 5)),
    "bic,io->boc": ((5, 4), (5, 3)),
}
OTHER_EINSUMS = {
    "bi,oi->ob": ((5,), (3, 5)),
    "bi,oi->b": ((5,), (3, 5)),
    "bhi,hi->bh": ((4, 5), (4, 5)),
    "bi...,oi->bo...": ((5, 2), (3, 5)),
    "bhi,hoi->bho": ((4, 5), (4, 3, 5)),
}


@pytest.mark.parametrize(("equation", "shapes"), [*EINSUMS.items(), *OTHER_EINSUMS.items()])
def test_einsums_that_are_linear_layers(equation: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, weight = torch.randn(2, *shapes[0]), nn.Parameter(torch.randn(shapes[1]))
    first = equation.startswith("oi")

    def forward(net: Any, value: torch.Tensor) -> torch.Tensor:
        return torch.einsum(equation, net.weight, value) if first else torch.einsum(equation, value, net.weight)

    model = Composed(forward, weight=weight)
    done = check_pass(Canonicalize(), capture(model, (x,)))
    targets = [node.target for node in done.module.graph.nodes]
    assert (aten.linear.default in targets) == (equation in EINSUMS)
    assert (aten.einsum.default in targets) == (equation not in EINSUMS)
    assert torch.allclose(done.module(x), model(x), atol=1e-5)
