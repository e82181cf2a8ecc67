from __future__ import annotations

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


class ClippedHead(nn.Module):
    """Two linear layers over rows; the clip behind the first is read by a layer in float, and by the second or not."""

    def __init__(self, clip: nn.Module, both: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.clip, self.norm, self.both = clip, nn.LayerNorm(16), both

    def forward(self, x: Tensor) -> Tensor:
        clipped = self.clip(self.first(x))
        normed = self.norm(clipped)
        answer: Tensor = self.second(clipped) + normed[:, :4] if self.both else self.second(normed)
        return answer


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("clip", [nn.ReLU(), nn.ReLU6()], ids=["relu", "relu6"])
def test_a_linear_layer_whose_clip_is_read_in_float_runs_on_integers(clip: nn.Module, both: bool) -> None:
    torch.manual_seed(0)
    images = CalibrationSet((torch.randn(16, 8),))
    program = flow.prepare(capture(ClippedHead(clip, both), images.inputs), Settings(bits=(8,)))
    program = flow.calibrate(program, images)
    plan = BitAllocation({site.name: Choice(8, 8) for site in program[Sites].sites})
    simulated = simulate(program, plan).module
    model = to_onnx(simulated).SerializeToString()
    assert kernel_report(model).kernels == {"first": "QGemm", "second": "QGemm"}
    expected = model_outputs(simulated, images.inputs)
    answer = executable(model, threads=1)(images.inputs)
    assert torch.allclose(answer, expected, atol=float(expected.max() - expected.min()) / 100)
