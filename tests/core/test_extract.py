from __future__ import annotations

import pytest
import torch

from fxquant.core.allocation import BitAllocation
from fxquant.core.extract import cut_out
from fxquant.core.graphs import resolve, show
from fxquant.passes.insert_fake_quant import InsertFakeQuant
from tests.programs import calibrated, folded, uniform

SEED = torch.Generator().manual_seed(0)


def test_a_float_layer_with_the_clip_behind_it() -> None:
    module = folded("separable").module
    cut, shape = cut_out(module, resolve(module.graph, "conv2d_1"))
    assert shape == (2, 8, 5, 5)
    assert show(cut) == (
        "x = x()\nconv2d_1 = conv2d.default(x, depthwise.weight, depthwise.bias)\n"
        "relu6 = relu6.default(conv2d_1)\nreturn relu6"
    )
    x = torch.randn(shape, generator=SEED)
    expected = torch.nn.functional.conv2d(
        x, cut.get_parameter("depthwise.weight"), cut.get_parameter("depthwise.bias"), padding=1, groups=8
    )
    assert torch.equal(cut(x), expected.clamp(0.0, 6.0))


def test_a_simulated_layer_keeps_its_quantizers() -> None:
    program = calibrated("separable")
    done = InsertFakeQuant()(program.with_facts(BitAllocation(uniform(program, 4))))
    cut, shape = cut_out(done.module, resolve(done.module.graph, "conv2d_1"))
    assert show(cut) == (
        "x = x()\nquantize_depthwise_weight = FakeQuantize(depthwise.weight)\n"
        "quantize_hardswish = FakeQuantize(x)\n"
        "conv2d_1 = conv2d.default(quantize_hardswish, quantize_depthwise_weight, depthwise.bias)\n"
        "relu6 = relu6.default(conv2d_1)\nquantize_relu6 = FakeQuantize(relu6)\nreturn quantize_relu6"
    )
    assert cut(torch.randn(shape, generator=SEED)).shape == shape


@pytest.mark.parametrize(("name", "node"), [("residual", "conv2d"), ("padded", "conv2d"), ("tokens", "linear_1")])
def test_whoever_has_several_readers_ends_the_cut(name: str, node: str) -> None:
    module = folded(name).module
    cut, shape = cut_out(module, resolve(module.graph, node))
    assert cut(torch.randn(shape, generator=SEED)).shape[0] == shape[0]
