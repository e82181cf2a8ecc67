"""Names and sizes of what a file takes and returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.onnx import to_onnx
from fxquant.capture import capture
from fxquant.core.errors import CaptureError

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Pair(NamedTuple):
    near: Tensor
    far: Tensor


@dataclass
class Detected:
    boxes: list[Tensor]
    q0: Tensor


class Net(nn.Module):
    """Returns what `answer` makes of a map and its mean."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.answer = answer

    def forward(self, input: Tensor) -> Any:  # noqa: A002 (the name is what is tested)
        x = self.head(self.conv(input).relu())
        return self.answer(x, x.mean((2, 3)))


def entries(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    return [entry.name for entry in model.graph.input], [entry.name for entry in model.graph.output]


def sizes(entry: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in entry.type.tensor_type.shape.dim]


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (lambda _, y: y, ["output"]),
        (lambda x, y: (x, y), ["output", "output_1"]),
        (lambda x, y: {"map": x, "scores": y}, ["map", "scores"]),
        (lambda x, y: {"map": x, "logits": y}, ["logits", "map"]),
        (lambda x, y: OrderedDict(second=y, first=x), ["second", "first"]),
        (lambda x, y: {"boxes": [x, y], "found": {3: y}}, ["boxes_0", "boxes_1", "found_3"]),
        (lambda x, _: {"none": None, "map": x}, ["map"]),
        (lambda x, y: Pair(x, y), ["near", "far"]),
        (lambda x, y: (x, {"scores": y}), ["output", "1_scores"]),
        # An input, an edge of the graph and a value inside are called so already.
        (lambda x, y: {"input": x, "conv": y}, ["input_2", "conv"]),
        (lambda x, y: Detected([x], y), ["boxes_0", "q0_2"]),
    ],
)
def test_outputs_are_called_by_their_keys(
    answer: Callable[[Tensor, Tensor], Any], names: list[str], tmp_path: Path
) -> None:
    result = fxquant.quantize(Net(answer).eval(), IMAGES, None, bits=(8,), effort="fast", progress=False)
    result.to_onnx(tmp_path / "net.onnx")
    assert entries(onnx.load(tmp_path / "net.onnx")) == (["input"], names)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    answers = [value for value in torch.utils._pytree.tree_leaves(result.simulated(IMAGES)) if value is not None]
    for name, known in zip(names, answers, strict=True):
        (found,) = session.run([name], {"input": IMAGES.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), known, atol=0.02, rtol=0)


def test_free_sizes_have_names_wherever_they_are() -> None:
    def answer(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x.permute(2, 3, 0, 1), y.repeat(1, 2).view(-1, 2), x.flatten(2)

    model = to_onnx(capture(Net(answer), (IMAGES[:2],), dynamic_image=True).module)
    assert sizes(model.graph.input[0]) == ["batch", 3, "height", "width"]
    assert [sizes(entry) for entry in model.graph.output] == [
        ["height", "width", "batch", 2],
        ["2*batch", 2],
        ["batch", 2, "height*width"],
    ]


def test_images_of_any_size_by_one_argument(tmp_path: Path) -> None:
    model = Net(lambda x, _: x).eval()
    result = fxquant.quantize(model, IMAGES, None, bits=(8,), effort="fast", dynamic_image=True, progress=False)
    result = fxquant.load(result.save(tmp_path / "result"))
    result.to_onnx(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    large = torch.nn.functional.pad(IMAGES, [0, 7, 0, 3])
    (found,) = session.run(None, {"input": large.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), result.simulated(large), atol=0.02, rtol=0)
    fixed = torch.export.export(model, (IMAGES[:1],))
    with pytest.raises(CaptureError, match="takes images of 12x12 only"):
        fxquant.quantize(fixed, IMAGES, None, dynamic_image=True, progress=False)
