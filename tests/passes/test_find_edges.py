from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.capture import capture
from fxquant.core.facts import Target
from fxquant.core.ir import Program, QuantizedEdges
from fxquant.passes import Canonicalize, FindEdges
from tests.models import MODELS, Composed
from tests.programs import TARGET, check_pass, folded

FLOAT_OUTPUT = replace(TARGET, output_quantized=frozenset())
"""A runtime whose kernels write floats."""


def edges_of(name: str, target: Target = TARGET, keep_float: dict[str, str] | None = None) -> QuantizedEdges:
    return FindEdges(target, keep_float or {})(folded(name))[QuantizedEdges]


def shown(edges: QuantizedEdges) -> str:
    return ", ".join(f"{e.producer} -> {e.consumer}" for e in edges.edges)


GOLDEN = {
    # relu_1 feeds silu (float) and a convolution: both its uses are quantized, for the kernel writes integers only.
    "residual": (
        "x -> conv2d, relu -> conv2d_1, relu -> add_25, conv2d_1 -> add_25, relu_1 -> silu, "
        "relu_1 -> conv2d_2, conv2d_2 -> add_46, mean -> linear"
    ),
    # Branches and what keeps their grid: relu is absorbed by the left convolution, batch norm runs in float.
    "concat": (
        "x -> conv2d, x -> conv2d_1, relu -> cat, conv2d_1 -> cat, cat -> max_pool2d, getitem -> conv2d_2, "
        "conv2d_2 -> mean, max_pool2d -> conv2d_3, conv2d_3 -> output"
    ),
    # One value in both slots of an add is one edge; a quantized value is also an answer.
    "two_inputs": (
        "image -> conv2d, mask -> conv2d_1, conv2d -> add_5, conv2d -> output, add_5 -> add_16, "
        "conv2d_1 -> add_16, add_16 -> conv2d_2, conv2d_2 -> mean"
    ),
    # Zero padding keeps the grid, padding with ones does not.
    "padded": (
        "x -> pad, pad -> conv2d, conv2d -> conv2d_1, relu -> max_pool2d, max_pool2d -> conv2d_2, "
        "conv2d_2 -> pad_1, pad_1 -> conv2d_3, conv2d_3 -> view"
    ),
    "tokens": "mean -> linear, relu -> linear_1",
    "weightless": "",
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden_edges(name: str) -> None:
    assert shown(edges_of(name)) == GOLDEN[name]


@pytest.mark.parametrize("name", list(MODELS))
def test_the_graph_is_not_touched_and_every_float_op_has_a_reason(name: str) -> None:
    program = folded(name)
    done = check_pass(FindEdges(TARGET), program)
    found = done[QuantizedEdges]
    assert done.log[-1].rewrites == 0
    names = {node.name for node in program.module.graph.nodes}
    assert found.integer_nodes <= names
    assert not set(found.float_reasons) & found.integer_nodes
    assert all(found.float_reasons.values())
    words = ("conv", "linear", "matmul", "embedding", "softmax")
    calls = [node for node in program.module.graph.nodes if node.op == "call_function"]
    heavy = {node.name for node in calls if any(word in str(node.target) for word in words)}
    assert heavy <= found.integer_nodes | set(found.float_reasons)


@pytest.mark.parametrize("target", [TARGET, FLOAT_OUTPUT], ids=["integer output", "float output"])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_integer_op_reads_quantized_values(name: str, target: Target) -> None:
    found = edges_of(name, target)
    edges = {(edge.producer, edge.consumer) for edge in found.edges}
    for node in folded(name).module.graph.nodes:
        if node.name in found.integer_nodes:
            inputs = [source for source in node.all_input_nodes if source.op != "get_attr"]
            assert inputs
            assert all((source.name, node.name) in edges for source in inputs)


def test_joins_are_kept_where_all_around_them_is_quantized() -> None:
    assert "add_25" in edges_of("residual").integer_nodes
    assert {"add_5", "add_16"} <= edges_of("two_inputs").integer_nodes
    assert "adaptive_avg_pool2d" in edges_of("separable").integer_nodes


def test_joins_are_refused_where_they_would_buy_borders() -> None:
    why = "its inputs or its output are in float anyway"
    found = edges_of("residual")
    assert found.float_reasons["add_46"] == why, "silu in front is in float"
    assert edges_of("add_of_floats").float_reasons["add_10"] == why, "both operands are in float"
    assert edges_of("concat").float_reasons["mean"] == why, "nothing behind computes on integers"
    assert edges_of("attention").float_reasons["add_173"] == why
    # Kernels that write floats quantize no inputs of the add.
    assert edges_of("residual", FLOAT_OUTPUT).float_reasons["add_25"] == why
    assert shown(edges_of("residual", FLOAT_OUTPUT)) == (
        "x -> conv2d, relu -> conv2d_1, relu_1 -> conv2d_2, mean -> linear"
    )


def test_refusals_are_distinguished() -> None:
    reasons = edges_of("functional").float_reasons
    assert reasons["conv2d"] == "its bias is computed by the graph, not a parameter"
    assert reasons["conv2d_1"] == "its weight is computed by the graph, not a parameter"
    assert reasons["add_15"] == "the second operand is scaled"
    assert reasons["mul_9"] == TARGET.refuse_joins["mul"]
    assert reasons["matmul"] == "target 'test' has no integer kernel for matmul"
    assert reasons["sum_1"] == "the op table has no row for it"
    assert edges_of("padded").float_reasons["pad_1"] == "only padding with zeros stays on the grid"
    assert "table look-up" in edges_of("tokens").float_reasons["embedding"]
    no_linear = replace(TARGET, kernels={"conv": "QConv"})
    assert edges_of("residual", no_linear).float_reasons["linear"] == "target 'test' has no integer kernel for linear"


def test_a_layer_whose_input_is_a_constant_stays_in_float() -> None:
    positions = Composed(
        lambda net, x: net.head(x + net.embed(net.table)),
        table=nn.Parameter(torch.randn(4, 3)),
        embed=nn.Linear(3, 5),
        head=nn.Linear(5, 2),
    )
    program = FindEdges(TARGET)(Canonicalize()(capture(positions, (torch.randn(2, 4, 5),))))
    found = program[QuantizedEdges]
    assert found.float_reasons["linear"] == "its input is a constant, so it could be computed beforehand"
    assert "linear_1" in found.integer_nodes


def test_layers_of_another_float_type_keep_it() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(net.first(x).bfloat16(), net.narrow)
        return (x + x).float()

    mixed = Composed(forward, first=nn.Linear(5, 5))
    mixed.register_buffer("narrow", torch.randn(5, 5).bfloat16())
    found = FindEdges(TARGET)(Canonicalize()(capture(mixed, (torch.randn(2, 5),))))[QuantizedEdges]
    assert "linear" in found.integer_nodes
    why = "it computes in bfloat16, and quantizers are for float32"
    others = [name for name, reason in found.float_reasons.items() if reason == why]
    assert [name.partition("_")[0] for name in others] == ["linear", "add"]


def test_a_site_kept_in_float_takes_its_edges_along() -> None:
    found = edges_of("residual", keep_float={"conv2": "too sensitive"})
    assert found.float_reasons["conv2d_1"] == "too sensitive"
    assert "conv2d_1" not in found.integer_nodes
    assert "conv2d_1" not in {edge.producer for edge in found.edges}
    # The first convolution's kernel still writes integers for all its readers; the add lost an operand.
    assert shown(found) == (
        "x -> conv2d, relu -> conv2d_1, relu -> add_25, relu_1 -> conv2d_2, conv2d_2 -> add_46, mean -> linear"
    )
    shared = edges_of("shared", keep_float={"conv": "shared"})
    assert {"conv2d", "conv2d_1"} <= set(shared.float_reasons)


def test_edges_come_in_graph_order_every_time() -> None:
    program: Program = folded("attention")
    order = {node.name: index for index, node in enumerate(program.module.graph.nodes)}
    first = edges_of("attention").edges
    keys = [(order[e.producer], order[e.consumer], e.slot) for e in first]
    assert keys == sorted(keys)
    assert first == edges_of("attention").edges


def test_products_of_two_activations_take_grids_where_the_target_wants_them() -> None:
    target = replace(TARGET, products=frozenset({"matmul"}))
    with_products, without = edges_of("attention", target), edges_of("attention")
    products = {name for name in with_products.integer_nodes if name.startswith("matmul")}
    assert products
    assert not products & without.integer_nodes
    read = {edge.producer for edge in with_products.edges if edge.consumer in products}
    assert any(name.startswith("softmax") for name in read)
    for name in products:
        assert sum(edge.consumer == name for edge in with_products.edges) == 2
        assert name not in with_products.float_reasons


def test_what_only_a_sum_reads_goes_unrounded_where_the_kernel_adds() -> None:
    target = replace(TARGET, fused_sums=frozenset({"conv"}))
    fused, apart = edges_of("residual", target), edges_of("residual")
    assert {(e.producer, e.consumer) for e in apart.edges} - {(e.producer, e.consumer) for e in fused.edges} == {
        ("conv2d_1", "add_25")
    }
    assert fused.integer_nodes == apart.integer_nodes
    # Where both operands could be computed together with the sum, only one can be.
    both = edges_of("two_inputs", target)
    lost = {(e.producer, e.consumer) for e in edges_of("two_inputs").edges} - {
        (e.producer, e.consumer) for e in both.edges
    }
    readers = [reader for _, reader in lost]
    assert readers
    assert len(readers) == len(set(readers))
    # A linear layer is not among the kinds, so the transformer keeps its edges.
    assert edges_of("attention", target).edges == edges_of("attention").edges


def test_what_runs_in_float_between_two_layers_has_a_reason() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.second(F.leaky_relu(net.group(net.first(x)), 0.1))
        answer: torch.Tensor = net.third(F.interpolate(net.instance(y), scale_factor=2, mode="bilinear"))
        return F.interpolate(answer, scale_factor=2) + torch.erf(net.slope(answer)).mean()

    layers = {name: nn.Conv2d(4, 4, 3, padding=1) for name in ("first", "second", "third")}
    norms = {"group": nn.GroupNorm(2, 4), "instance": nn.InstanceNorm2d(4), "slope": nn.PReLU(4)}
    program = Canonicalize()(capture(Composed(forward, **layers, **norms).eval(), (torch.randn(2, 4, 6, 6),)))
    edges = FindEdges(TARGET)(program)[QuantizedEdges]
    told = {name: why for name, why in edges.float_reasons.items() if "add" not in name and "mean" not in name}
    assert told["erf"] == "the op table has no row for it"
    assert "deviation" in told["group_norm"]
    assert "deviation" in told["instance_norm"]
    assert "single values" in told["leaky_relu"]
    assert "single values" in told["prelu"]
    assert "cuts off" in told["upsample_bilinear2d"]
    # Nearest neighbours keep the grid.
    assert not [name for name in told if "nearest" in name]
