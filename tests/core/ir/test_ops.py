"""The op table row by row: positions against the op's schema, multiply-accumulates against torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils.flop_counter import FlopCounterMode

from fxquant.capture import capture
from fxquant.core.ir import (
    OPS,
    REFUSED,
    OpRule,
    ScaleRule,
    activation_inputs,
    clip_bounds,
    images_axis,
    resolve,
    rule_of,
    shape_of,
)
from tests.models import MODELS
from tests.programs import folded

aten = torch.ops.aten
ROWS = list(OPS.items())
SEED = torch.Generator().manual_seed(0)


def name_of(op: object) -> str:
    return str(op)


def make_node(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Return a node of an op whose tensor arguments are placeholders that know their value's shape."""
    graph = Graph()

    def lift(value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [lift(member) for member in value]
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"arg_{len(graph.nodes)}")
        node.meta["val"] = value
        return node

    node = graph.call_function(op, tuple(lift(a) for a in args), {k: lift(v) for k, v in kwargs.items()})
    node.meta["val"] = op(*args, **kwargs)
    return node


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=SEED)


@pytest.mark.parametrize(("op", "rule"), ROWS, ids=map(name_of, OPS))
def test_positions_are_those_of_the_schema(op: object, rule: OpRule) -> None:
    assert isinstance(op, OpOverload)
    arguments = op._schema.arguments
    positional = [argument.name for argument in arguments if not argument.kwarg_only]
    types = {argument.name: str(argument.type) for argument in arguments}
    first = {"input", "self", "tensors", "other", "mat2"}
    for position in rule.activations:
        assert positional[position] in first
        assert types[positional[position]] in ("Tensor", "List[Tensor]")
    tensors = [name for name in positional if types[name] in ("Tensor", "List[Tensor]")]
    if rule.weight is not None:
        assert positional[rule.weight] == "weight"
        assert rule.bias is not None
        assert positional[rule.bias] == "bias"
        assert rule.macs is not None
    elif rule.scale is not ScaleRule.FLOAT:
        assert [positional[p] for p in rule.activations] == tensors, (
            "every tensor of an op without weights is activation"
        )


@pytest.mark.parametrize("op", list(REFUSED), ids=name_of)
def test_refused_ops_exist_and_have_no_row(op: object) -> None:
    assert isinstance(op, OpOverload)
    assert op not in OPS
    assert REFUSED[op]


MAC_CASES: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (aten.conv1d.default, (rand(2, 4, 9), rand(6, 4, 3), rand(6), [2], [1])),
    (aten.conv1d.default, (rand(2, 4, 9), rand(6, 2, 3), None, [1], [0], [1], 2)),
    (aten.conv1d.padding, (rand(2, 4, 9), rand(6, 4, 3), None, [1], "same")),
    (aten.conv2d.default, (rand(2, 3, 8, 7), rand(5, 3, 3, 2), None, [2, 1], [1, 0])),
    (aten.conv2d.default, (rand(2, 8, 6, 6), rand(8, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 8)),
    (aten.conv2d.default, (rand(1, 8, 6, 6), rand(4, 2, 3, 3), rand(4), [1, 1], [2, 2], [2, 2], 4)),
    (aten.conv2d.padding, (rand(2, 3, 8, 7), rand(5, 3, 3, 3), None, [1, 1], "valid")),
    (aten.linear.default, (rand(3, 5), rand(7, 5), rand(7))),
    (aten.linear.default, (rand(2, 4, 5), rand(7, 5))),
    (aten.matmul.default, (rand(2, 3, 4, 5), rand(2, 3, 5, 6))),
    (aten.matmul.default, (rand(4, 5), rand(5, 6))),
    (aten.bmm.default, (rand(2, 4, 5), rand(2, 5, 6))),
]


@pytest.mark.parametrize(("op", "args"), MAC_CASES, ids=[f"{name_of(op)}-{i}" for i, (op, _) in enumerate(MAC_CASES)])
def test_macs_are_what_torch_counts(op: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with FlopCounterMode(display=False) as counter:
        op(*args)
    rule = OPS[op]
    assert rule.macs is not None
    assert counter.get_total_flops() > 0
    assert 2 * rule.macs(make_node(op, *args)) == counter.get_total_flops()


def test_every_row_with_macs_was_counted() -> None:
    assert {op for op, rule in ROWS if rule.macs is not None} == {op for op, _ in MAC_CASES}


KEEPS: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (aten.max_pool1d.default, ([3], [1], [1])),
    (aten.max_pool2d.default, ([3, 3], [2, 2], [1, 1])),
    (aten.pad.default, ([1, 0, 0, 2],)),
    (aten.constant_pad_nd.default, ([1, 1],)),
    (aten.slice.Tensor, (1, 0, 2)),
    (aten.select.int, (2, 1)),
    (aten.view.default, ([2, -1],)),
    (aten.reshape.default, ([-1, 4],)),
    (aten._unsafe_view.default, ([2, 64],)),
    (aten.flatten.using_ints, (1,)),
    (aten.unsqueeze.default, (1,)),
    (aten.squeeze.dim, (0,)),
    (aten.squeeze.dims, ([0, 1],)),
    (aten.permute.default, ([0, 2, 3, 1],)),
    (aten.transpose.int, (1, 2)),
    (aten.t.default, ()),
    (aten.upsample_nearest1d.vec, ([12], None)),
    (aten.upsample_nearest2d.vec, (None, [2.0, 1.5])),
    (aten.pixel_shuffle.default, (2,)),
    (aten.pixel_unshuffle.default, (2,)),
    (aten.channel_shuffle.default, (2,)),
    (aten.clone.default, ()),
    (aten.contiguous.default, ()),
]


def example_for(op: object) -> Tensor:
    if op is aten.t.default:
        return rand(4, 6)
    return rand(3, 4, 8) if op in (aten.max_pool1d.default, aten.upsample_nearest1d.vec) else rand(2, 4, 4, 4)


@pytest.mark.parametrize(("op", "args"), KEEPS, ids=[name_of(op) for op, _ in KEEPS])
def test_keepers_bring_no_new_values(op: Callable[..., Any], args: tuple[Any, ...]) -> None:
    x = example_for(op)
    node = make_node(op, x, *args)
    rule = rule_of(node)
    assert rule is not None
    assert rule.scale is ScaleRule.KEEP
    known = {*x.flatten().tolist(), 0.0}
    assert set(op(x, *args).flatten().tolist()) <= known


def test_every_keeper_was_tried() -> None:
    assert {op for op, rule in ROWS if rule.scale is ScaleRule.KEEP} == {op for op, _ in KEEPS}


X4, Y4 = rand(2, 3, 4, 4), rand(2, 3, 4, 4)
REFUSALS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str | None]] = [
    (aten.add.Tensor, (X4, Y4), {}, None),
    (aten.add.Tensor, (X4, rand(2, 3, 1, 1)), {}, None),
    (aten.add.Tensor, (X4, 1.0), {}, "one operand is a constant"),
    (aten.add.Tensor, (X4, Y4), {"alpha": 2}, "the second operand is scaled"),
    (aten.mul.Tensor, (X4, torch.tensor(2.0)), {}, "one operand is a scalar"),
    (aten.mul.Tensor, (torch.tensor(2.0), X4), {}, "one operand is a scalar"),
    (aten.mul.Tensor, (X4, rand(2, 3, 1, 1)), {}, None),
    (aten.mean.dim, (X4, [2, 3]), {}, None),
    (aten.mean.dim, (X4, [-1, -2], True), {}, None),
    (aten.mean.dim, (X4, [1]), {}, "only a mean over both spatial axes has an integer kernel"),
    (aten.mean.dim, (rand(2, 3, 4), [1, 2]), {}, "only a mean over both spatial axes has an integer kernel"),
    (aten.adaptive_avg_pool2d.default, (X4, [1, 1]), {}, None),
    (aten.adaptive_avg_pool2d.default, (X4, [2, 2]), {}, "only adaptive pooling to one pixel has an integer kernel"),
    (aten.pad.default, (X4, [1, 1]), {}, None),
    (aten.pad.default, (X4, [1, 1], "constant", 0.0), {}, None),
    (aten.pad.default, (X4, [1, 1], "constant", None), {}, None),
    (aten.pad.default, (X4, [1, 1], "constant", 0.5), {}, "only padding with zeros stays on the grid"),
    (aten.pad.default, (X4, [1, 1, 1, 1], "reflect"), {}, "only padding with zeros stays on the grid"),
    (aten.constant_pad_nd.default, (X4, [1, 1], 3), {}, "only padding with zeros stays on the grid"),
    (aten.clamp.default, (X4, 0), {}, None),
    (aten.clamp.default, (X4, None, 6.0), {}, None),
    (aten.clamp.default, (X4, 0.5, 0.1), {}, "its lower bound lies above the upper one"),
]


@pytest.mark.parametrize(("op", "args", "kwargs", "why"), REFUSALS)
def test_refusals_have_reasons(
    op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], why: str | None
) -> None:
    node = make_node(op, *args, **kwargs)
    refuse, rule = OPS[op].refuse, rule_of(node)
    assert refuse is not None
    assert rule is not None
    assert refuse(node) == why
    assert (rule.scale is ScaleRule.FLOAT) == (why is not None)
    assert rule.kind == OPS[op].kind


def test_every_refusal_was_tried() -> None:
    refused = {op for op, _, _, why in REFUSALS if why is not None}
    assert refused == {op for op, rule in ROWS if rule.refuse is not None}


def test_a_clip_to_a_computed_bound_is_refused() -> None:
    node = make_node(aten.clamp.default, X4, 0)
    node.args = (node.args[0], None, node.graph.placeholder("size"))
    refuse, rule = OPS[aten.clamp.default].refuse, rule_of(node)
    assert refuse is not None
    assert refuse(node) == "its bounds are computed by the graph"
    assert rule is not None
    assert rule.scale is ScaleRule.FLOAT


@pytest.mark.parametrize("op", [op for op, rule in ROWS if rule.scale is ScaleRule.ABSORB], ids=name_of)
def test_absorbed_clips_have_the_bounds_that_they_are_said_to_have(op: Callable[..., Any]) -> None:
    given = (-2.0, 6.0) if op in (aten.hardtanh.default, aten.clamp.default) else ()
    x = 10 * rand(100)
    assert torch.equal(op(x, *given), x.clamp(*clip_bounds(make_node(op, x, *given))))


def test_inputs_come_in_argument_order_with_lists_opened() -> None:
    node = make_node(aten.cat.default, [X4, Y4, X4], 1)
    assert [n.name for n in activation_inputs(node)] == [n.name for n in node.all_input_nodes]
    conv = resolve(folded("residual").module.graph, "conv2d")
    assert [n.name for n in activation_inputs(conv)] == ["x"], "weights and biases are no activations"
    placeholder = resolve(folded("residual").module.graph, "x")
    assert rule_of(placeholder) is None
    assert activation_inputs(placeholder) == ()


def test_shapes_count_the_batch_as_traced() -> None:
    conv = resolve(folded("residual").module.graph, "conv2d")
    assert shape_of(conv) == (2, 8, 8, 8)
    assert shape_of(None) == ()
    assert MODELS["residual"].inputs(2)[0].shape == (2, 3, 8, 8)


def test_the_axis_of_images_is_where_the_batch_went() -> None:
    nodes = {node.name: node for node in folded("residual").module.graph.nodes if "val" in node.meta}
    assert images_axis(nodes["x"]) == 0
    weights = [node for node in nodes.values() if node.op == "get_attr"]
    assert weights
    assert all(images_axis(node) is None for node in weights)


def test_images_that_moved_to_another_axis_are_found() -> None:
    class Moved(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1).relu()

    graph = capture(Moved(), (torch.zeros(2, 3),)).module.graph
    assert [images_axis(node) for node in graph.nodes if node.op != "output"] == [0, 1, 1]
