"""Answers that jump are judged by what leads to them: nearly equal scores are no fault, a wrong layer is one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fxquant
from fxquant import flow
from fxquant.backends.onnx import to_onnx
from fxquant.core.facts import Settings
from fxquant.core.run import CalibrationSet, Jump, discrete_answers
from fxquant.parity import Parity, compare
from fxquant.passes import simulate, widest_plan

IMAGES = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
RUNTIMES = ("onnxruntime", "fx_int8")


class Net(nn.Module):
    """Two convolutions; the second has rows in pairs of equal weights, so that scores tie unless a bit differs."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        with torch.no_grad():
            self.two.weight[3:] = self.two.weight[:3]
            assert self.two.bias is not None
            self.two.bias[3:] = self.two.bias[:3]
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.two(torch.relu(self.one(x))))


def kept(y: Tensor) -> tuple[Tensor, Tensor]:
    scores, which = y.sigmoid().amax(1).flatten(1).topk(9)
    boxes = y.flatten(2).transpose(1, 2)
    return torch.gather(boxes, 1, which[..., None].expand(-1, -1, 6)), scores


def wide(y: Tensor) -> Tensor:
    return F.interpolate(y, scale_factor=2.0, mode="bilinear")


ANSWERS: dict[str, Callable[[Tensor], Any]] = {
    "class of each pixel": lambda y: y.argmax(1),
    "class of each pixel, enlarged": lambda y: wide(y).argmax(1),
    "class of each image": lambda y: y.mean((2, 3)).argmax(1),
    "best scores and their boxes": kept,
    "order": lambda y: y.flatten(1).argsort(1),
    "mask": lambda y: wide(y) > 0,
    "bytes": lambda y: (wide(y).sigmoid() * 255).to(torch.uint8),
    "masked floats": lambda y: torch.where(y.amax(1, True) > 0.3, y, -1.0),
    "classes and scores": lambda y: {"classes": wide(y).argmax(1), "scores": wide(y).softmax(1)},
    "one number": lambda y: y.argmax(1).float().mean(),
    "time first": lambda y: y.flatten(2).permute(2, 0, 1),
}


@cache
def simulated(name: str) -> GraphModule:
    program = flow.prepare(fxquant.capture(Net(ANSWERS[name]), IMAGES), Settings(bits=(8,)))
    program = flow.calibrate(program, CalibrationSet((IMAGES,)))
    return simulate(program, widest_plan(program)).module


def checked(name: str, lowered_from: GraphModule | None = None) -> Parity:
    module = simulated(name)
    models = {} if lowered_from is None else {".onnx": to_onnx(lowered_from).SerializeToString()}
    against = RUNTIMES if lowered_from is None else RUNTIMES[:1]
    return compare(module, CalibrationSet((IMAGES,)), against, models, threads=1)


@pytest.mark.parametrize("name", ANSWERS)
def test_ties_are_no_fault(name: str) -> None:
    found = checked(name)
    assert found.within, found.summary()


@pytest.mark.parametrize("name", ANSWERS)
def test_a_wrong_last_layer_is_found_behind_every_answer(name: str) -> None:
    wrong = copy.deepcopy(simulated(name))
    with torch.no_grad():
        wrong.get_parameter("two.bias").add_(torch.linspace(-0.05, 0.05, 6))
    found = checked(name, wrong)
    assert not found.within, found.summary()


def test_what_leads_to_a_jump_is_the_last_smooth_value() -> None:
    graphs = {name: simulated(name).graph for name in ("class of each pixel", "bytes", "best scores and their boxes")}
    found = {name: discrete_answers(graph) for name, graph in graphs.items()}
    assert found["class of each pixel"] == {0: Jump(("quantize_conv2d_1",), ())}
    (bytes_,) = found["bytes"].values()
    assert bytes_.fronts == bytes_.leading
    assert bytes_.leading[0].startswith("mul")
    # Boxes are picked by an order; scores are in it, which changes as little as they do.
    assert list(found["best scores and their boxes"]) == [0]
    assert found["best scores and their boxes"][0].leading == ("amax",)


def test_a_table_says_the_share_of_equal_classes() -> None:
    found = checked("class of each pixel")
    assert all(pair.agreement is not None and pair.agreement > 0.4 for pair in found.pairs)
    assert all(pair.max_step < 1 for pair in found.pairs if pair.reference == "exact")
