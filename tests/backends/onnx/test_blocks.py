from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.backends.onnx import (
    OnnxOptions,
    block_linear,
    block_weights,
    executable,
    export_onnx,
    kernel_report,
    to_blocks,
    to_onnx,
)
from fxquant.capture import capture
from fxquant.core.errors import OptionError
from fxquant.core.ir import Grid, Program
from fxquant.passes import Canonicalize
from tests.backends.lowered import calibrated, plan_of


class Classifier(nn.Module):
    """Convolution, pooling, a hidden layer behind a float function, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 96, 3)
        self.hidden = nn.Linear(96, 128)
        self.norm = nn.LayerNorm(128)
        self.head = nn.Linear(128, 40, bias=False)
        for layer in (self.hidden, self.head):
            # Long tails, as trained weights have them; on uniform ones a finer scale gains nothing.
            layer.weight.data *= torch.randn_like(layer.weight).exp()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        answer: Tensor = self.head(self.norm(self.hidden(x)))
        return answer


def program() -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 8, 8)
    return Canonicalize()(capture(Classifier(), (images[:2],))), images


def simulated(*widths: int) -> tuple[GraphModule, Tensor]:
    made, images = program()
    return plan_of(calibrated(made, (images,)), widths), images


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (2, 32), (3, 64)])
def test_blocks_are_never_coarser_than_channels(bits: int, block: int) -> None:
    torch.manual_seed(bits)
    weight, bias, x = torch.randn(10, 100), torch.randn(10), torch.randn(5, 2, 100)
    q, scale = block_weights(weight, block, bits)
    assert q.shape == (100, 10)
    assert scale.shape == (-(-100 // block), 10)
    rounded = block_linear(torch.eye(100), q, scale, None, block, bits).T
    channels = Grid.of_weight(weight, bits).round_trip(weight)
    assert ((rounded - weight) ** 2).sum() < ((channels - weight) ** 2).sum()
    expected = nn.functional.linear(x, rounded, bias)
    assert torch.allclose(block_linear(x, q, scale, bias, block, bits), expected, atol=1e-5)


@pytest.mark.parametrize(("width", "opset"), [(4, 21), (2, 25), (3, 21)])
def test_named_layers_become_products_of_packed_blocks(width: int, opset: int, tmp_path: Path) -> None:
    module, images = simulated(width)
    options = OnnxOptions(weight_only=("hidden", "h*d"))
    report = export_onnx(module, tmp_path / "model.onnx", options=options)
    assert report.weight_only == ("hidden", "head")
    assert report.opset == opset
    kernels = kernel_report(report.path)
    assert kernels.kernels == {"conv": "QLinearConv", "hidden": "MatMulNBits", "head": "MatMulNBits"}
    # The image's quantizer, and the way from the integer pooling to the hidden layer; none in front of the head.
    assert kernels.operators["QuantizeLinear"] == 1
    assert kernels.operators["DequantizeLinear"] == 1
    assert kernels.stray == ()
    blocks, names = to_blocks(module, options.weight_only, 32)
    assert names == report.weight_only
    expected = blocks(images).detach()
    found = executable(report.path)((images,))
    # The kernel rounds each block of the row to 8 bits.
    assert float((found - expected).abs().max()) < 0.1 * float(expected.std())


@pytest.mark.parametrize("width", [2, 4])
def test_answers_are_closer_to_the_float_model_than_those_of_the_plan(width: int) -> None:
    made, images = program()
    module, _ = simulated(8, width, width)
    exact = made.module(images).detach()

    def error(answer: Tensor) -> float:
        return float(((answer.detach() - exact) ** 2).mean())

    options = OnnxOptions(weight_only=("hidden", "head"), block_size=16)
    found = executable(to_onnx(module, options=options).SerializeToString())((images,))
    assert error(found) < error(module(images))


def test_a_single_row_of_a_batch_has_the_same_answer() -> None:
    module, images = simulated(4)
    run = executable(to_onnx(module, options=OnnxOptions(weight_only=("head",))).SerializeToString())
    assert torch.allclose(run((images[:1],)), run((images,))[:1], atol=1e-5)


@pytest.mark.parametrize(
    ("width", "pattern", "block"),
    [(4, "nothing*", 32), (8, "head", 32), (4, "head", 128), (4, "hidden", 64), (4, "conv", 16)],
)
def test_a_pattern_without_a_fitting_layer_says_which_there_are(width: int, pattern: str, block: int) -> None:
    module, _ = simulated(width)
    with pytest.raises(OptionError, match=r"there are: (head, hidden|head|none)"):
        to_onnx(module, options=OnnxOptions.of({"weight_only": (pattern,), "block_size": block}))
