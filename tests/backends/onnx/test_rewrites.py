from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant import flow
from fxquant.backends.onnx import executable, kernel_report, rewrites, to_onnx
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


def _attention(m: Any, y: Tensor) -> Tensor:
    first, second = y.chunk(2, 1)
    joined = torch.cat([first, m.part(second)], 1)
    return torch.sigmoid(m.whole(joined.std((2, 3), keepdim=True))) * joined


def _distilled(m: Any, y: Tensor) -> Any:
    first, rest = torch.split_with_sizes(y, [2, 6], 1)
    second, third = torch.split_with_sizes(rest, [2, 4], 1)
    joined = torch.cat([first, second, m.part(third)], 1)
    return m.whole(joined) + joined.softmax(1)


def _dense(m: Any, y: Tensor) -> Any:
    first = torch.cat([y[:, :4], torch.relu(m.part(y[:, 4:]))], 1)
    second = torch.cat([first[:, 4:], torch.relu(m.part(first[:, :4]))], 1)
    return m.whole(second) - second.amax((2, 3), keepdim=True).tanh()


def _rows(m: Any, y: Tensor) -> Any:
    above, below = y[:, :, :4], y[:, :, 4:]
    joined = torch.cat([below, above], 2)
    return m.whole(joined) + nn.functional.gelu(above).mean((2, 3), keepdim=True) * joined.std((2, 3), keepdim=True)


@pytest.mark.parametrize("answer", [_attention, _distilled, _dense, _rows], ids=lambda answer: answer.__name__[1:])
def test_parts_are_joined_on_integers_where_something_reads_them_in_float_too(
    answer: Callable[[Any, Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = {"part": nn.Conv2d(4, 4, 3, padding=1), "whole": nn.Conv2d(8, 8, 1), "end": nn.Conv2d(8, 8, 1)}
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.1))
    model = Composed(lambda m, x: m.end(answer(m, m.stem(x))), stem=stem, **layers)
    images = CalibrationSet((torch.randn(16, 3, 8, 8),))
    program = flow.calibrate(flow.prepare(capture(model, images.inputs), Settings(bits=(8,))), images)
    simulated = simulate(program, BitAllocation({site.name: Choice(8, 8) for site in program[Sites].sites})).module
    file = to_onnx(simulated).SerializeToString()
    monkeypatch.setattr(rewrites, "MOVES", ())
    plain = to_onnx(simulated).SerializeToString()
    after, before = (kernel_report(each) for each in (file, plain))
    # Shapes are computed by Concat too.
    joins = after.operators["QLinearConcat"] - before.operators.get("QLinearConcat", 0)
    assert joins == before.operators["Concat"] - after.operators.get("Concat", 0) > 0
    assert len(after.stray) < len(before.stray)
    found, expected = (executable(each, threads=1)(images.inputs) for each in (file, plain))
    assert torch.equal(found, expected)
