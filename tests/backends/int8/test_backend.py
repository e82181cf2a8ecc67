from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.backends import backend
from fxquant.backends.int8 import (
    EXACT_KERNEL,
    Dequantize,
    FxInt8Backend,
    IntegerConv,
    IntegerPad,
    Quantize,
    kernel_report,
)
from fxquant.core.errors import LoweringError
from fxquant.core.ir import (
    FakeQuantize,
    Grid,
    QuantSpec,
    ScaleRule,
    rule_of,
    show,
)
from fxquant.core.run import CalibrationSet, first_tensor
from fxquant.parity import compare
from tests.backends.lowered import calibrated, plan_of
from tests.models import MODELS
from tests.programs import first_answer, folded

TARGET = backend("fx_int8").target
WITH_SITES = [name for name in MODELS if name != "weightless"]


@cache
def _simulated(name: str, bits: tuple[int, ...] = (8, 4, 2, 3), activation_bits: int = 8) -> GraphModule:
    widths, inputs = tuple(sorted(set(bits))), MODELS[name].inputs(8)
    ready = calibrated(folded(name), inputs, widths=widths, target=TARGET, activation_bits=activation_bits)
    return plan_of(ready, bits, activation_bits)


@pytest.mark.parametrize("activation_bits", [8, 4])
@pytest.mark.parametrize("name", WITH_SITES)
def test_each_layer_is_within_one_step_of_the_simulation(name: str, activation_bits: int) -> None:
    images = CalibrationSet(MODELS[name].inputs(5))
    found = compare(_simulated(name, activation_bits=activation_bits), images, ("fx_int8",))
    assert found.within, found.summary()
    exact, simulation = found.pairs
    assert exact.edges == simulation.edges > 0
    # One step is for ties that float32 rounds the other way; the exact reference rounds as the kernels do.
    assert exact.layer_step < 1e-3, found.summary()
    assert simulation.layer_step <= 1.001, found.summary()


@pytest.mark.parametrize("name", WITH_SITES)
def test_whole_network_gives_the_simulations_answer_for_any_batch(name: str) -> None:
    simulated = _simulated(name)
    text, lowered = show(simulated), FxInt8Backend().lower(simulated)
    exact = FxInt8Backend(exact=True).lower(simulated)
    for count in (1, 5):
        inputs = MODELS[name].inputs(count)
        expected = first_answer(simulated, inputs)
        tolerance = float(expected.abs().max()) * 0.01
        torch.testing.assert_close(first_answer(lowered, inputs), expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(first_answer(exact, inputs), expected, atol=tolerance, rtol=0)
    assert show(simulated) == text
    assert EXACT_KERNEL in kernel_report(exact).values()


def test_chain_of_integers_has_no_quantizer_inside() -> None:
    lowered = FxInt8Backend().lower(_simulated("residual"))
    assert show(lowered) == "\n".join(
        [
            "x = x()",
            "quantize_x = Quantize(x)",
            "conv2d = IntegerConv(quantize_x)",
            "conv2d_1 = IntegerConv(conv2d)",
            "dequantize_quantize_relu_1 = Dequantize(conv2d_1)",
            "silu = silu.default(dequantize_quantize_relu_1)",
            "conv2d_2 = IntegerConv(conv2d_1)",
            "dequantize_quantize_conv2d_2 = Dequantize(conv2d_2)",
            "add_46 = add.Tensor(silu, dequantize_quantize_conv2d_2)",
            "mean = mean.dim(add_46)",
            "quantize_mean = Quantize(mean)",
            "linear = IntegerLinear(quantize_mean)",
            "return linear",
        ]
    )


@pytest.mark.parametrize("name", WITH_SITES)
def test_nothing_is_dequantized_only_to_be_quantized_again(name: str) -> None:
    lowered = FxInt8Backend().lower(_simulated(name))
    kinds = {node: lowered.get_submodule(str(node.target)) for node in lowered.graph.nodes if node.op == "call_module"}
    for node, module in kinds.items():
        if isinstance(module, Quantize):
            above = node.args[0]
            while isinstance(above, Node) and (rule := rule_of(above)) and rule.scale is ScaleRule.KEEP:
                above = above.args[0]
            assert not isinstance(kinds.get(above), Dequantize), node


def test_a_convolution_does_not_write_over_its_own_input() -> None:
    lowered = FxInt8Backend().lower(_simulated("inverted"))
    own = [n for n in lowered.graph.nodes if n.op == "call_module" and len(n.args) == 2 and n.args[0] is n.args[1]]
    assert [lowered.get_submodule(node.target).may_overwrite for node in own] == [False]


def test_report_names_the_kernel_or_the_reason() -> None:
    report = kernel_report(FxInt8Backend().lower(_simulated("attention")))
    assert report["conv2d"] == "onednn.qconv2d_pointwise"
    assert report["linear_3"] == "aten._int_mm"
    assert report["matmul"] == f"float: {TARGET.refuse_joins['matmul']}"
    functional = kernel_report(FxInt8Backend().lower(_simulated("functional")))
    assert functional["conv2d"].startswith("float: its input carries no quantizer")
    inverted = kernel_report(FxInt8Backend().lower(_simulated("inverted")))
    assert inverted["conv2d_3"] == inverted["conv2d_4"] == "onednn.qconv2d_pointwise.binary"
    tokens = kernel_report(FxInt8Backend().lower(_simulated("tokens")))
    assert tokens["embedding"].startswith("float: a table look-up")


@pytest.mark.parametrize("name", ["residual", "attention", "weightless"])
def test_float_model_runs_as_it_is(name: str) -> None:
    module, inputs = folded(name).module, MODELS[name].inputs(3)
    run = FxInt8Backend().compile(module, inputs)
    # Attention in one call adds in another order.
    torch.testing.assert_close(run(inputs), first_answer(module, inputs), rtol=1e-5, atol=1e-6)
    reasons = kernel_report(FxInt8Backend().lower(module))
    assert all(reason.startswith("float: ") for reason in reasons.values())


def _clipped_conv(clip: Any, zero_point: int, bits: int) -> tuple[GraphModule, Tensor]:
    """Return conv -> clip -> quantizer -> conv by hand: grids that calibration would not choose.

    The scales are no multiples of each other, so that no value lies between two steps.
    """
    torch.manual_seed(0)
    graph, root = torch.fx.Graph(), nn.Module()
    activation = QuantSpec(bits, signed=False, symmetric=False)
    root.first_in = FakeQuantize(Grid(QuantSpec(8, False, False), torch.tensor(0.02), torch.tensor(128)))
    root.between = FakeQuantize(Grid(activation, torch.tensor(0.0537), torch.tensor(zero_point)))
    root.grid = FakeQuantize(Grid(QuantSpec(8, True, True, 0), torch.full((4,), 0.0103), torch.zeros(4)))
    root.register_buffer("weight", torch.randn(4, 4, 3, 3) * 0.4)
    x = graph.placeholder("x")
    weight = graph.call_module("grid", (graph.get_attr("weight"),))
    conv = torch.ops.aten.conv2d.default
    value = graph.call_function(conv, (graph.call_module("first_in", (x,)), weight, None, [1, 1], [1, 1]))
    for target, arguments in clip:
        value = graph.call_function(target, (value, *arguments))
    value = graph.call_module("between", (value,))
    graph.output(graph.call_function(conv, (value, weight, None, [1, 1], [1, 1])))
    return GraphModule(root, graph), torch.randn(2, 4, 6, 6)


RELU, RELU6, CLAMP = (getattr(torch.ops.aten, name).default for name in ("relu", "relu6", "clamp"))


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("zero_point", [0, 9, 30])
@pytest.mark.parametrize(
    "clip", [(), ((RELU, ()),), ((RELU6, ()),), ((CLAMP, (0.0, 0.5)),), ((RELU, ()), (CLAMP, (0.0, 0.8)))]
)
def test_clip_is_absorbed_and_still_clips(clip: Any, zero_point: int, bits: int) -> None:
    simulated, x = _clipped_conv(clip, zero_point, bits)
    lowered = FxInt8Backend().lower(simulated)
    kinds = [type(lowered.get_submodule(str(n.target))) for n in lowered.graph.nodes if n.op == "call_module"]
    assert kinds == [Quantize, IntegerConv, IntegerConv]
    assert len(lowered.graph.nodes) == len(kinds) + 2
    torch.testing.assert_close(lowered(x), simulated(x), atol=1e-3, rtol=0)


def test_a_value_with_a_float_reader_stays_whole() -> None:
    """A convolution whose raw output is also returned must not be written on the quantizer's grid only."""
    simulated, x = _clipped_conv(((RELU, ()),), 0, 4)
    graph = simulated.graph
    relu = next(node for node in graph.nodes if node.target is RELU)
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ((output.args[0], relu),)
    simulated.recompile()
    for made, expected in zip(FxInt8Backend().lower(simulated)(x), simulated(x), strict=True):
        torch.testing.assert_close(made, expected, atol=1e-3, rtol=0)


def test_learned_rounding_is_kept() -> None:
    class Up(FakeQuantize):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ceil(x / 0.0103).clamp(-128, 127) * 0.0103

    simulated, x = _clipped_conv((), 9, 8)
    nearest = FxInt8Backend().lower(simulated)(x)
    nearest_grid = simulated.get_submodule("grid")
    assert isinstance(nearest_grid, FakeQuantize)
    simulated.grid = Up(nearest_grid.grid)
    made = FxInt8Backend().lower(simulated)(x)
    torch.testing.assert_close(made, simulated(x), atol=1e-3, rtol=0)
    assert (made - nearest).abs().max() > 0.01


@pytest.mark.parametrize("name", ["residual", "attention", "sequence"])
def test_exported_program_runs_the_same_kernels(name: str) -> None:
    lowered, inputs = FxInt8Backend().lower(_simulated(name)), MODELS[name].inputs(3)
    exported = torch.export.export(lowered, inputs)
    assert "fxquant.conv2d_u8" in str(exported.graph)
    torch.testing.assert_close(
        first_tensor(exported.module()(*inputs)), first_tensor(lowered(*inputs)), atol=1e-4, rtol=0
    )


def test_compile_uses_the_threads_asked_for_and_gives_them_back() -> None:
    simulated, inputs = _simulated("residual"), MODELS["residual"].inputs(2)
    seen = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return x

    simulated = FxInt8Backend().lower(simulated)
    simulated.add_submodule("watch", Watch())
    first = next(node for node in simulated.graph.nodes if node.op == "placeholder")
    with simulated.graph.inserting_after(first):
        watch = simulated.graph.call_module("watch", (first,))
    first.replace_all_uses_with(watch, lambda user: user is not watch)
    simulated.recompile()
    before = torch.get_num_threads()
    run = FxInt8Backend().compile(simulated, inputs, threads=before + 1)
    assert run(inputs).dtype == torch.float32
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_no_inputs_is_an_error() -> None:
    with pytest.raises(LoweringError, match="example inputs"):
        FxInt8Backend().compile(folded("residual").module, ())


def test_padding_of_integers_is_the_zero_point() -> None:
    simulated = _simulated("padded")
    lowered = FxInt8Backend().lower(simulated)
    pads = [module for module in lowered.modules() if isinstance(module, IntegerPad)]
    assert len(pads) == 1
    quantize = lowered.get_submodule("integer.quantize_x")
    assert isinstance(quantize, Quantize)
    assert quantize.grid.zero_point > 0
    assert pads[0].value == quantize.grid.zero_point
