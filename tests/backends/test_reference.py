from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.backends import (
    INT32_LIMIT,
    backend,
    dequantize,
    dequantize_channels,
    quantize,
    stored_channels,
    to_qdq,
)
from fxquant.capture import capture
from fxquant.core.errors import LoweringError
from fxquant.core.ir import (
    FakeQuantize,
    Grid,
    QuantSpec,
    activation_spec,
    finish,
    fork,
    insert_after,
    nodes_by_name,
    show,
    tensor_at,
    weight_spec,
)
from fxquant.core.run import model_outputs
from tests.backends.lowered import QUANTIZED, example, quantizers, simulated
from tests.programs import folded


def one_layer(weight: Tensor, bias: Tensor | None, weight_grid: FakeQuantize, input_grid: FakeQuantize) -> GraphModule:
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    module = fork(capture(nn.Sequential(layer), (torch.randn(2, weight.shape[1], 3, 3),)).module)
    nodes = nodes_by_name(module.graph)
    conv = next(node for node in module.graph.nodes if node.op == "call_function" and "conv2d" in str(node.target))
    reads = next(node for node in nodes.values() if node.op == "get_attr" and str(node.target).endswith("weight"))
    entry = next(node for node in module.graph.nodes if node.op == "placeholder")
    insert_after(module, entry, "quantize_x", input_grid, [conv])
    insert_after(module, reads, "quantize_weight", weight_grid, [conv])
    return finish(module)


def input_grid(scale: float = 0.02, zero_point: int = 128) -> FakeQuantize:
    return FakeQuantize(Grid(activation_spec(8), torch.tensor(scale), torch.tensor(zero_point)))


def weight_grid(scale: list[float], bits: int = 8) -> FakeQuantize:
    return FakeQuantize(Grid(weight_spec(bits), torch.tensor(scale), torch.zeros(len(scale), dtype=torch.int32)))


def integers_of(module: torch.fx.GraphModule, dtype: torch.dtype) -> list[Any]:
    """Return what dequantizes weights (int8) or biases (int32)."""
    found = [node for node in module.graph.nodes if node.target in (dequantize_channels, stored_channels)]
    return [node for node in found if tensor_at(module, str(node.args[0].target)).dtype == dtype]


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("widths", [(8,), (4, 8, 2)])
def test_weights_are_the_simulated_ones_as_integers_of_their_width(name: str, widths: tuple[int, ...]) -> None:
    module = simulated(name, widths)
    lowered = to_qdq(module)
    on_weights = [n for n in module.graph.nodes if n.op == "call_module" and n.args[0].op == "get_attr"]
    grids = {n.args[0].target: module.get_submodule(n.target) for n in on_weights}
    seen = set[str]()
    for node in integers_of(lowered, torch.int8):
        q, scale = (tensor_at(lowered, str(part.target)) for part in node.args[:2])
        path = re.sub(r"_q(_1)?$", "", str(node.args[0].target))
        # A tied weight is read by an integer layer and stored for a table.
        seen.add(path)
        grid = grids[path]
        assert isinstance(grid, FakeQuantize)
        assert int(q.min()) >= grid.spec.qmin
        assert int(q.max()) <= grid.spec.qmax
        assert torch.equal(dequantize_channels(q, scale, node.args[2]), grid(tensor_at(module, path)))
    assert on_weights
    assert seen == set(grids)


def test_without_bias_reference_and_simulation_are_equal() -> None:
    weight = torch.tensor([[0.5, -0.25], [0.1, 0.3]]).reshape(2, 2, 1, 1)
    module = one_layer(weight, None, weight_grid([0.004, 0.003]), input_grid())
    x = torch.randn(3, 2, 3, 3)
    assert torch.allclose(backend("reference").compile(module, (x,))((x,)), module(x), atol=1e-6)


def test_a_float_graph_stays_what_it_is() -> None:
    module, inputs = folded("residual").module, example("residual", 4)
    assert show(to_qdq(module)) == show(module)
    # `model_outputs` runs convolutions with channels last, which sums in another order.
    made = backend("reference").compile(module, inputs)(inputs)
    assert torch.allclose(made, model_outputs(module, inputs), rtol=1e-5, atol=1e-6)


def test_the_simulated_graph_is_not_changed() -> None:
    module = simulated("residual")
    text, state = show(module), {name: value.clone() for name, value in module.state_dict().items()}
    to_qdq(module)
    assert show(module) == text
    assert set(module.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_activations_become_quantize_and_dequantize_nodes() -> None:
    lowered = to_qdq(simulated("residual"))
    targets = [node.target for node in lowered.graph.nodes if node.op == "call_function"]
    assert targets.count(quantize) == targets.count(dequantize) > 0
    assert not quantizers(lowered)


def test_a_learned_rounding_is_kept() -> None:
    class RoundsDown(FakeQuantize):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.scale.reshape(-1, 1, 1, 1)
            return torch.floor(x / scale) * scale

    weight = torch.full((1, 2, 1, 1), 0.0199)
    grid = RoundsDown(Grid(weight_spec(8), torch.tensor([0.01]), torch.zeros(1, dtype=torch.int32)))
    lowered = to_qdq(one_layer(weight, None, grid, input_grid()))
    node = next(node for node in lowered.graph.nodes if node.target is dequantize_channels)
    assert tensor_at(lowered, str(node.args[0].target)).flatten().tolist() == [1, 1]


def test_the_bias_of_a_dead_channel_fits_int32() -> None:
    weight = torch.zeros(2, 2, 1, 1)
    weight[0] = 0.5
    bias = torch.tensor([0.25, 3.0])
    module = one_layer(weight, bias, weight_grid([0.004, 2.0**-40]), input_grid())
    lowered = to_qdq(module)
    (node,) = integers_of(lowered, torch.int32)
    integers = tensor_at(lowered, str(node.args[0].target))
    assert 0 < int(integers.abs().max()) <= INT32_LIMIT
    x = torch.randn(3, 2, 3, 3)
    answer = backend("reference").compile(module, (x,))((x,))
    assert torch.allclose(answer, module(x), atol=1e-4)


def test_a_bias_behind_a_float_input_stays_float() -> None:
    grid = weight_grid([0.004])
    module = one_layer(torch.full((1, 2, 1, 1), 0.5), torch.tensor([0.3]), grid, input_grid())
    node = nodes_by_name(module.graph)["quantize_x"]
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    node.replace_all_uses_with(source)
    module.graph.erase_node(node)
    lowered = to_qdq(finish(module))
    assert len(integers_of(lowered, torch.int8)) == 1
    assert not integers_of(lowered, torch.int32)


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (QuantSpec(8, True, True), activation_spec(8)),
        (QuantSpec(8, False, False, channel_axis=0), activation_spec(8)),
        (weight_spec(8), QuantSpec(8, True, True)),
    ],
)
def test_grids_without_kernel_are_refused(weight: QuantSpec, activation: QuantSpec) -> None:
    size = () if weight.channel_axis is None else (1,)
    module = one_layer(
        torch.full((1, 2, 1, 1), 0.5),
        None,
        FakeQuantize(Grid(weight, torch.full(size, 0.004), torch.zeros(size, dtype=torch.int32))),
        FakeQuantize(Grid(activation, torch.tensor(0.02), torch.tensor(0))),
    )
    with pytest.raises(LoweringError, match="grid"):
        to_qdq(module)


def test_narrow_activations_stay_on_their_grid() -> None:
    q = quantize(torch.tensor([-9.0, 0.1, 9.0]), torch.tensor(0.5), torch.tensor(3), 0, 15)
    assert q.tolist() == [0, 3, 15]
    assert dequantize(q, torch.tensor(0.5), torch.tensor(3)).tolist() == [-1.5, 0.0, 6.0]
