from __future__ import annotations

import pytest
import torch

from fxquant.core.facts import BitAllocation
from fxquant.core.ir import Program, Sites, resolve, show
from fxquant.core.run import GraphReplay, cut_out
from fxquant.passes import InsertFakeQuant
from tests.programs import calibrated as calibrated_for_conv
from tests.programs import folded, uniform
from tests.scoring import calibrated, inputs, simulated


def check(program: Program) -> None:
    """Every op cut out of the network gives the value it has inside, bit for bit."""
    replay = GraphReplay(program.module)
    _, values = replay.forward(inputs("plain", 1))
    for site in program[Sites].sites:
        for name in site.nodes:
            node = resolve(program.module.graph, name)
            cut, shape = cut_out(program.module, node)
            source = node.all_input_nodes[0]
            outside = source.all_input_nodes[0] if source.op == "call_module" else source
            assert shape == tuple(values[replay.by_name[outside.name]].shape)
            found = cut(values[replay.by_name[outside.name]])
            inside = [value for n, value in values.items() if n.name == last_name(cut)]
            assert len(inside) == 1
            assert torch.equal(found, inside[0])


def last_name(cut: torch.fx.GraphModule) -> str:
    """Return the name of the node whose value the cut returns; copies keep their names."""
    return str(list(cut.graph.nodes)[-1].args[0])


@pytest.mark.parametrize("quantized", [False, True])
def test_an_op_alone_computes_what_it_computes_inside(quantized: bool) -> None:
    check(simulated("plain") if quantized else calibrated("plain"))


def test_a_float_op_takes_its_clip_along() -> None:
    program = calibrated("plain")
    node = resolve(program.module.graph, program[Sites].by_name("conv1").nodes[0])
    cut, shape = cut_out(program.module, node)
    assert shape == (1, 3, 6, 6)
    assert (
        show(cut)
        == "x = x()\nconv2d = conv2d.default(x, conv1.weight, conv1.bias)\nrelu = relu.default(conv2d)\nreturn relu"
    )


def test_an_integer_op_takes_its_quantizers_along() -> None:
    program = calibrated_for_conv("residual")
    plan = BitAllocation(uniform(program, 4))
    module = InsertFakeQuant()(program.with_facts(plan)).module
    cut, _ = cut_out(module, resolve(module.graph, program[Sites].by_name("conv1").nodes[0]))
    assert show(cut).splitlines() == [
        "x = x()",
        "quantize_conv1_weight = FakeQuantize(conv1.weight)",
        "quantize_x = FakeQuantize(x)",
        "conv2d = conv2d.default(quantize_x, quantize_conv1_weight, conv1.bias)",
        "relu = relu.default(conv2d)",
        "quantize_relu = FakeQuantize(relu)",
        "return quantize_relu",
    ]
    assert cut(torch.randn(5, 3, 8, 8)).shape[0] == 5


@pytest.mark.parametrize(("name", "node"), [("residual", "conv2d"), ("padded", "conv2d"), ("tokens", "linear_1")])
def test_whoever_has_several_readers_ends_the_cut(name: str, node: str) -> None:
    module = folded(name).module
    cut, shape = cut_out(module, resolve(module.graph, node))
    assert cut(torch.randn(shape)).shape[0] == shape[0]
