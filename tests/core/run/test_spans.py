"""Stretches cut out of a graph compute what the graph computes, and differentiate through to their inputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.core.ir import Sites, is_constant, nodes_by_name, resolve, show, tensor_at
from fxquant.core.run import (
    GraphReplay,
    Span,
    cut_out,
    cut_span,
    first_tensor,
    is_quantizer,
    is_size,
    is_tensor,
    varying_nodes,
)
from fxquant.passes.rounding.learned import Unit, find_units
from tests import scoring
from tests.models import MODELS

NAMES = [name for name in MODELS if name != "weightless"]
COUNT = 5
"""Images, other than the two that networks are traced with."""


def module_of(name: str) -> GraphModule:
    return scoring.simulated(name).module


def values_of(name: str) -> dict[str, Tensor]:
    starts = [node.name for node in module_of(name).graph.nodes if node.op == "placeholder"]
    return dict(zip(starts, scoring.inputs(name, COUNT), strict=True))


def answer_of(module: GraphModule) -> str:
    return next(node.name for node in module.graph.output_node().all_input_nodes if is_tensor(node))


def whole(name: str, quantized: bool) -> Span:
    module = module_of(name)
    nodes = [node.name for node in varying_nodes(module.graph)]
    return cut_span(module, nodes, [answer_of(module)], quantized)


def units_of(name: str, granularity: str) -> tuple[Unit, ...]:
    program = scoring.simulated(name)
    return find_units(program.module, program[Sites].sites, granularity)


def producer(module: GraphModule, name: str) -> str:
    node = nodes_by_name(module.graph)[name]
    return node.all_input_nodes[0].name if is_quantizer(module, node) else name


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_graph_is_the_float_or_the_simulated_one_bit_for_bit(name: str, quantized: bool) -> None:
    module = module_of(name) if quantized else scoring.calibrated(name).module
    expected = first_tensor(module(*scoring.inputs(name, COUNT)))
    assert torch.equal(whole(name, quantized)(values_of(name))[answer_of(module_of(name))], expected)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("name", NAMES)
def test_units_one_after_the_other_are_the_whole_graph(name: str, granularity: str, quantized: bool) -> None:
    module, values = module_of(name), values_of(name)
    for unit in units_of(name, granularity):
        span = cut_span(module, unit.nodes, unit.outputs, quantized)
        assert set(span.inputs) <= set(unit.inputs)
        values |= span(values)
    expected = whole(name, quantized)(values_of(name))[answer_of(module)]
    assert torch.equal(values[answer_of(module)], expected)


def test_a_size_that_another_unit_computes_is_an_input_that_grows_with_the_images() -> None:
    spans = [
        cut_span(module_of(name), unit.nodes, unit.outputs, True) for name in NAMES for unit in units_of(name, "layer")
    ]
    assert any(span.sizes for span in spans)
    assert all(size > 0 for span in spans for size in span.sizes.values())
    module = module_of("attention")
    reader = next(node for node in varying_nodes(module.graph) if any(is_size(s) for s in node.all_input_nodes))
    span = cut_span(module, [reader.name], [reader.name], False)
    assert list(span.sizes.values()) == [1]
    assert len(span.inputs) == len([s for s in reader.all_input_nodes if is_tensor(s) and s.op != "get_attr"])


@pytest.mark.parametrize("name", NAMES)
def test_a_span_trains_nothing_and_leaves_the_graph_its_parameters(name: str) -> None:
    module = module_of(name)
    before = dict(module.named_parameters())
    span = whole(name, True)
    assert isinstance(span.module, nn.Module)
    assert not list(span.module.parameters())
    assert dict(module.named_parameters()).keys() == before.keys()
    held = {tensor.data_ptr() for tensor in span.module.buffers()}
    assert held & {parameter.data_ptr() for parameter in before.values()}, "weights are copied"


def test_replacements_are_at_every_place_of_their_quantizer() -> None:
    module = module_of("shared")
    places = [n.name for n in module.graph.nodes if is_quantizer(module, n) and is_constant(n.all_input_nodes[0])]
    nodes = [node.name for node in varying_nodes(module.graph)]
    span = cut_span(module, nodes, [answer_of(module)], True, dict.fromkeys(places, _Zero()))
    assert isinstance(span.module, nn.Module)
    assert any(isinstance(part, _Zero) for part in span.module.modules())
    answer = span(values_of("shared"))[answer_of(module)]
    assert torch.equal(answer, answer[:1].expand_as(answer)), "weights of 0 leave the biases alone"
    assert not any(isinstance(part, _Zero) for part in module.modules())


def test_a_replacement_of_an_op_returns_its_bias() -> None:
    module = module_of("residual")
    nodes = [node.name for node in varying_nodes(module.graph)]
    last = [node for node in module.graph.nodes if node.name in nodes and "linear" in node.name][-1]
    before, bias = last.args, torch.arange(5.0)
    plain, moved = (cut_span(module, nodes, [last.name], True, places) for places in ({}, {last.name: _Bias(bias)}))
    values, own = values_of("residual"), tensor_at(module, str(last.args[2].target))
    assert torch.allclose(moved(values)[last.name], plain(values)[last.name] - own + bias, atol=1e-5)
    assert isinstance(moved.module, nn.Module)
    assert len(list(moved.module.parameters())) == 1
    assert last.args == before, "the graph itself stays"


class _Bias(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.value


class _Given(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: Tensor) -> Tensor:
        return self.value


class _Zero(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.0


def test_many_images_run_in_batches() -> None:
    span, values = whole("residual", True), values_of("residual")
    (name,) = span.outputs
    assert torch.allclose(span.run(values, 2)[name], span(values)[name], atol=1e-6)


def test_a_compiled_span_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[object]()

    def backend(graph: GraphModule, _: object) -> GraphModule:
        calls.append(graph)
        return graph

    span = whole("plain", True)
    expected = span(values_of("plain"))[span.outputs[0]]
    # The default backend needs a C++ compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    assert torch.allclose(span.compiled()(values_of("plain"))[span.outputs[0]], expected, atol=1e-6)
    assert calls


@pytest.mark.parametrize("name", ["residual", "attention", "separable", "shared"])
def test_the_suffix_behind_a_unit_equals_a_replay_with_the_unit_substituted(name: str) -> None:
    module, (unit, *later) = module_of(name), units_of(name, "block")
    suffix = cut_span(module, [node for each in later for node in each.nodes], [answer_of(module)], quantized=False)
    values = values_of(name)
    values |= cut_span(module, unit.nodes, unit.outputs, quantized=False)(values)
    generator = torch.Generator().manual_seed(0)
    # A value may cross the cut twice, before its quantizer and behind it.
    sources = {key: producer(module, key) for key in suffix.inputs}
    moved = {
        source: values[key] + 0.1 * torch.randn(values[key].shape, generator=generator)
        for key, source in sources.items()
    }
    replay = GraphReplay(scoring.calibrated(name).module)
    answer, base = replay.forward(scoring.inputs(name, COUNT))
    expected, _ = replay.replay(base, {source: _Given(value) for source, value in moved.items()})
    found = suffix({key: moved[sources[key]] for key in suffix.inputs})[suffix.outputs[0]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(answer, expected)


def test_gradients_reach_every_input_through_quantizers_too() -> None:
    module, (before, unit, *_) = module_of("residual"), units_of("residual", "block")
    values = cut_span(module, before.nodes, before.outputs, quantized=True)(values_of("residual"))
    inputs = {key: values[key].clone().requires_grad_(True) for key in unit.inputs}
    made = cut_span(module, unit.nodes, unit.outputs, quantized=True)(inputs)
    gradients = torch.autograd.grad([value.sum() for value in made.values()], list(inputs.values()))
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients)


class TestCutOut:
    """One op with its quantizers and its clip."""

    @pytest.mark.parametrize("quantized", [False, True])
    def test_it_computes_what_it_computes_inside(self, quantized: bool) -> None:
        program = scoring.simulated("plain") if quantized else scoring.calibrated("plain")
        _, environment = GraphReplay(program.module).forward(scoring.inputs("plain", 1))
        values = {node.name: value for node, value in environment.items()}
        for site in program[Sites].sites:
            node = resolve(program.module.graph, site.nodes[0])
            cut, shape = cut_out(program.module, node)
            x = values[producer(program.module, node.all_input_nodes[0].name)]
            assert shape == tuple(x.shape)
            # Copies keep their names.
            inside = values[cut.graph.output_node().all_input_nodes[0].name]
            torch.testing.assert_close(cut(x), inside, rtol=1e-5, atol=1e-5)

    def test_a_float_op_takes_its_clip_along(self) -> None:
        program = scoring.calibrated("plain")
        cut, shape = cut_out(program.module, resolve(program.module.graph, "conv2d"))
        assert shape == (1, 3, 6, 6)
        assert show(cut).splitlines() == [
            "x = x()",
            "conv2d = conv2d.default(x, conv1.weight, conv1.bias)",
            "relu = relu.default(conv2d)",
            "return relu",
        ]

    def test_an_integer_op_takes_its_quantizers_along(self) -> None:
        cut, _ = cut_out(module_of("plain"), resolve(module_of("plain").graph, "conv2d"))
        assert show(cut).splitlines() == [
            "x = x()",
            "quantize_x = FakeQuantize(x)",
            "quantize_conv1_weight = FakeQuantize(conv1.weight)",
            "conv2d = conv2d.default(quantize_x, quantize_conv1_weight, conv1.bias)",
            "relu = relu.default(conv2d)",
            "quantize_relu = FakeQuantize(relu)",
            "return quantize_relu",
        ]
        assert cut(torch.randn(5, 3, 6, 6)).shape[0] == 5

    @pytest.mark.parametrize(("name", "node"), [("residual", "conv2d"), ("padded", "conv2d"), ("tokens", "linear_1")])
    def test_a_value_with_several_readers_ends_it(self, name: str, node: str) -> None:
        module = scoring.calibrated(name).module
        cut, shape = cut_out(module, resolve(module.graph, node))
        assert cut(torch.randn(shape)).shape[0] == shape[0]
