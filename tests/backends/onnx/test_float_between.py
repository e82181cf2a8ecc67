"""Norms, interpolations and functions of single values between integer layers: what ONNX Runtime makes of each."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import fxquant
from fxquant.backends.int8 import kernel_report
from fxquant.core.ir import QuantizedEdges

CONVERTED = {"DequantizeLinear", "QuantizeLinear"}
MOVES = {"Transpose", "Shape", "Reshape", "Identity"}
BETWEEN: list[tuple[nn.Module, set[str]]] = [
    (nn.GroupNorm(2, 8), {"InstanceNormalization", "Mul", "Add", *CONVERTED}),
    (nn.InstanceNorm2d(8, affine=True), {"InstanceNormalization", *CONVERTED}),
    (nn.Upsample(scale_factor=2), {"Resize"}),
    (nn.Upsample(scale_factor=2, mode="bilinear"), {"Resize", *CONVERTED}),
    (nn.LeakyReLU(0.1), {"QLinearLeakyRelu"}),
    (nn.PReLU(), {"QLinearLeakyRelu"}),
    (nn.PReLU(8), {"Max", "Mul", *CONVERTED}),
    (nn.Sigmoid(), {"QLinearSigmoid"}),
    (nn.SiLU(), {"QLinearSigmoid", "QLinearMul"}),
    (nn.Hardswish(), {"HardSigmoid", "Mul", *CONVERTED}),
]
"""What is between two convolutions, and the operators that ONNX Runtime runs there."""


@pytest.mark.slow
@pytest.mark.parametrize(("between", "operators"), BETWEEN, ids=lambda each: type(each).__name__)
def test_layers_around_it_run_on_integers(between: nn.Module, operators: set[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Integers that a plain convolution wrote come in, and one more reads what goes out.
    layers = [nn.Conv2d(3, 8, 3, padding=1), between, nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    model, images = nn.Sequential(*layers).eval(), torch.randn(8, 3, 8, 8)
    result = fxquant.quantize(model, images, {"average_bits": 8}, effort="fast", target="onnxruntime", progress=False)
    result.to_onnx(tmp_path / "net.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", options, providers=["CPUExecutionProvider"])
    ran = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    first, *_, third = (index for index, name in enumerate(ran) if name == "QLinearConv")
    assert ran.count("QLinearConv") == 3
    assert set(ran[first:third]) - MOVES - {"QLinearConv"} == operators
    # The only other conversions are those of image and answer.
    assert ran.count("QuantizeLinear") == 1 + ("QuantizeLinear" in operators)
    parity = fxquant.check(result, images)
    assert all(pair.within for pair in parity.pairs), parity
    (made,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    error = (torch.from_numpy(made) - model(images)).square().mean() / model(images).square().mean()
    assert error < 10 ** (-25 / 10)
    integers = fxquant.lower(result, "fx_int8")
    assert not [why for why in kernel_report(integers).values() if why.startswith("float")]
    reasons = result.program[QuantizedEdges].float_reasons
    assert ("has no row" in " ".join(reasons.values())) is False


@pytest.mark.parametrize("size", [(12, 10), (8, 20), (20, 24)])
@pytest.mark.parametrize("given", [{}, {"align_corners": True}, {"antialias": True}], ids=str)
def test_bicubic_interpolation_to_any_size_runs(size: tuple[int, int], given: dict[str, bool], tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.interpolate(self.one(x).relu(), size=size, mode="bicubic", **given)
            made: torch.Tensor = self.two(y)
            return made

    images = torch.randn(8, 3, 16, 16)
    result = fxquant.quantize(Resized().eval(), images, {"average_bits": 8}, bits=(8,), effort="fast", progress=False)
    path = result.to_onnx(tmp_path / "net.onnx").path
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    # Where a value lies on the border of two steps the runtimes may differ.
    torch.testing.assert_close(torch.from_numpy(made), result.simulated(images), rtol=0, atol=0.02)
