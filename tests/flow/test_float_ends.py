"""The first and the last layers of a network that returns an image stay in float where that loses less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import Result
from fxquant.backends.onnx import kernel_report
from fxquant.core.errors import InfeasibleBudgetError
from fxquant.core.ir import Sites

ENDS = ["first", "last"]


class Restoration(nn.Module):
    """Images to images of twice their size; the body adds little to what the first layer found."""

    def __init__(self, blocks: int = 10, width: int = 32, share: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        body = (layer for _ in range(blocks) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU()))
        self.body, self.share = nn.Sequential(*body), share
        self.last = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return nn.functional.pixel_shuffle(self.last(y + self.share * self.body(y)), 2)


class Classification(Restoration):
    """The same layers, whose answer is class scores."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


def _images(count: int = 16) -> Tensor:
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def _result(model: nn.Module, **options: Any) -> Result:
    return fxquant.quantize(
        model, _images(), {"average_bits": 8}, bits=(8,), effort="fast", progress=False, options=options
    )


def _in_float(result: Result) -> list[str]:
    names = {site.name for site in result.program[Sites].sites}
    return [name for name in ENDS if name not in names]


def _lost(result: Result, model: nn.Module) -> float:
    unseen = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return float((result.simulated(unseen) - model(unseen)).square().mean())


def test_both_ends_stay_in_float_where_that_loses_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Restoration()
    images = _images()
    result = fxquant.quantize(model, images, {"average_bits": 8}, bits=(8,), effort="fast")
    assert "first, last, the first and last layers, stay in float: then the loss" in capsys.readouterr().err
    assert _in_float(result) == ENDS
    assert _lost(result, model) < 0.8 * _lost(_result(model, float_ends="never"), model)
    reasons = result.report_data()["coverage"]["reasons"]
    assert [(each["layers"], each["reason"][:21]) for each in reasons] == [
        (["conv2d", "conv2d_11"], "a first or last layer")
    ]
    # The file and what is saved do the same.
    assert result.to_onnx(tmp_path / "file.onnx").bytes > 0
    assert kernel_report(tmp_path / "file.onnx").float_layers == tuple(ENDS)
    loaded = fxquant.load(result.save(tmp_path / "saved"))
    assert _in_float(loaded) == ENDS
    assert torch.equal(loaded.simulated(images), result.simulated(images))


def test_a_plan_of_such_a_result_compiles(tmp_path: Path) -> None:
    model = Restoration()
    result = _result(model)
    result.allocation.to_json(tmp_path / "plan.json")
    options: dict[str, Any] = {
        "plan": tmp_path / "plan.json",
        "calibration": _images(),
        "inductor": False,
        "progress": False,
    }
    made = torch.compile(model, backend="fxquant", options=options)
    with torch.inference_mode():
        found, plain = made(_images(2)), result.simulated(_images(2))
    assert float((found - plain).square().mean()) < 1e-4 * float(plain.square().mean())


@pytest.mark.parametrize(
    ("model", "options"),
    [
        pytest.param(Restoration(), {"pin_ends": True}, id="pinned ends"),
        pytest.param(Restoration(), {"pins": {"la*": "W8A8"}}, id="a pin on one of them"),
        pytest.param(Restoration(), {"float_ends": "never"}, id="as asked"),
        pytest.param(Restoration(), {"recipe": "fit"}, id="a recipe"),
        pytest.param(Restoration(blocks=2), {}, id="too much work"),
        pytest.param(Classification(), {}, id="classes"),
    ],
)
def test_ends_are_quantized_where_it_does_not_pay_or_is_not_wanted(model: nn.Module, options: dict[str, Any]) -> None:
    assert _in_float(_result(model, **options)) == []


def test_ends_are_quantized_where_the_loss_hardly_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.flow.float_ends.GAIN", 50.0)
    assert _in_float(_result(Restoration())) == []


def test_ends_are_quantized_where_the_budget_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    # In float both take 0.045 of the file, in 8 bits 0.011; all others have to be of 2 bits either way.
    model = Restoration()
    budget = {"size_ratio": 0.09}
    result = fxquant.quantize(model, _images(), budget, bits=(2, 8), effort="fast")
    assert _in_float(result) == []
    assert "with the first and last layers in float no plan keeps size_ratio=0.09, so they are quantized" in (
        capsys.readouterr().err
    )
    assert "so they are quantized" in result.summary()
    with pytest.raises(InfeasibleBudgetError):
        fxquant.quantize(
            model, _images(), budget, bits=(2, 8), effort="fast", progress=False, options={"float_ends": "always"}
        )


def test_ends_stay_in_float_as_asked() -> None:
    assert _in_float(_result(Classification(), float_ends="always")) == ENDS
