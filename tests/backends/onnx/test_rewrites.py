from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant import flow
from fxquant.backends.onnx import executable, kernel_report, to_onnx
from fxquant.capture import capture
from fxquant.core.facts import BitAllocation, Settings
from fxquant.core.ir import Choice, Sites
from fxquant.core.run import CalibrationSet, model_outputs
from fxquant.passes import simulate
from tests.models import Composed


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("clip", [nn.ReLU(), nn.ReLU6()], ids=["relu", "relu6"])
def test_a_linear_layer_whose_clip_is_read_in_float_runs_on_integers(clip: nn.Module, both: bool) -> None:
    """The clip behind the first linear layer is read by a layer norm, and by the second linear layer or not."""

    def answer(m: Any, x: Tensor) -> Any:
        clipped = m.clip(m.first(x))
        normed = m.norm(clipped)
        return m.second(clipped) + normed[:, :4] if both else m.second(normed)

    torch.manual_seed(0)
    model = Composed(answer, first=nn.Linear(8, 16), second=nn.Linear(16, 4), clip=clip, norm=nn.LayerNorm(16))
    images = CalibrationSet((torch.randn(16, 8),))
    program = flow.prepare(capture(model, images.inputs), Settings(bits=(8,)))
    program = flow.calibrate(program, images)
    plan = BitAllocation({site.name: Choice(8, 8) for site in program[Sites].sites})
    simulated = simulate(program, plan).module
    file = to_onnx(simulated).SerializeToString()
    assert kernel_report(file).kernels == {"first": "QGemm", "second": "QGemm"}
    expected = model_outputs(simulated, images.inputs)
    found = executable(file, threads=1)(images.inputs)
    assert torch.allclose(found, expected, atol=float(expected.max() - expected.min()) / 100)


def test_zeros_around_an_image_are_folded_into_the_convolution_side_by_side() -> None:
    torch.manual_seed(0)
    model = Composed(lambda m, x: m.conv(nn.functional.pad(x, (0, 3, 1, 0))), conv=nn.Conv2d(3, 8, 3, padding=(1, 0)))
    images = CalibrationSet((torch.rand(8, 3, 9, 9),))
    program = flow.calibrate(flow.prepare(capture(model, images.inputs), Settings(bits=(8,))), images)
    simulated = simulate(program, BitAllocation({"conv": Choice(8, 8)})).module
    file = to_onnx(simulated)
    assert [node.op_type for node in file.graph.node].count("Pad") == 0
    found, expected = (
        executable(file.SerializeToString(), threads=1)(images.inputs),
        model_outputs(simulated, images.inputs),
    )
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=float(expected.max() - expected.min()) / 100)
