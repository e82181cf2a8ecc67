from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import parts
from fxquant.core.errors import CalibrationError, CaptureError, MemoryLimitError, OptionError
from fxquant.parts import part


class Backbone(nn.Module):
    """What is worth quantizing; its second input has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.relu(self.conv(x)) * scale


class Detector(nn.Module):
    """Control flow around a backbone that no export follows."""

    def __init__(self, scale: float = 1.0, twice: bool = False) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.idle = nn.Linear(2, 2)
        self.head = nn.Linear(8, 4)
        self.scale, self.twice = scale, twice

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.backbone(x, self.scale) if self.scale != 1.0 else self.backbone(x)
        if self.twice:
            features = features + self.backbone(x.flip(3))
        scores = self.head(features.mean(dim=(2, 3)))
        # The number of rows depends on values.
        return [row[row > 0] for row in scores]


IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def detector(scale: float = 1.0, twice: bool = False) -> Detector:
    torch.manual_seed(0)
    return Detector(scale, twice).eval()


def test_a_part_of_a_model_that_cannot_be_captured_is_quantized_and_put_back() -> None:
    model = detector()
    with pytest.raises(CaptureError):
        fxquant.capture(model, IMAGES)
    taken = part(model, "backbone", IMAGES)
    assert torch.equal(taken.inputs.inputs[0], IMAGES)
    budget = fxquant.Budget(average_bits=8)
    result = fxquant.quantize(taken.module, taken.inputs, budget, bits=(8,), effort="fast", progress=False)
    smaller = taken.put_back(result.lowered)
    assert model.backbone is taken.module
    assert smaller is not model
    with torch.no_grad():
        for whole, quantized in zip(model(IMAGES[:5]), smaller(IMAGES[:5]), strict=True):
            assert whole.shape == quantized.shape
            torch.testing.assert_close(quantized, whole, atol=0.05, rtol=0)
            assert not torch.equal(quantized, whole)


def test_every_call_counts_and_every_place_is_replaced() -> None:
    model = detector(twice=True)
    model.add_module("again", model.backbone)
    taken = part(model, "again", IMAGES[:5])
    assert taken.inputs.inputs[0].shape[0] == 10
    replaced = taken.put_back(nn.Identity())
    assert isinstance(replaced.backbone, nn.Identity)
    assert isinstance(replaced.again, nn.Identity)


def test_the_limit_counts_images_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(part(detector(), "head", IMAGES, limit=7).inputs) == 7
    monkeypatch.setattr(parts, "LARGEST", 100)
    with pytest.raises(MemoryLimitError, match=r"the inputs of 'head' take more than .* GB; give fewer images"):
        part(detector(), "head", IMAGES)


def test_what_cannot_be_taken_is_said() -> None:
    with pytest.raises(OptionError, match="no submodule 'backbon'; near: backbone"):
        part(detector(), "backbon", IMAGES)
    with pytest.raises(CalibrationError, match="never calls 'idle'"):
        part(detector(), "idle", IMAGES)
    with pytest.raises(CaptureError, match="'backbone' is called with scale=float, which is no tensor"):
        part(detector(scale=2.0), "backbone", IMAGES)
    with pytest.raises(CalibrationError, match=r"does not run on images of shape \[\(4, 1, 8, 8\)\]"):
        part(detector(), "backbone", IMAGES[:4, :1])
