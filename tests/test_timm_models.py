"""Models of timm and torchvision as plain modules, where they are installed; `benchmarks.coverage` runs many more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.backends.onnx import executable
from fxquant.core.facts import BitAllocation, Settings
from fxquant.core.ir import Choice, Sites
from fxquant.core.run import first_tensor
from tests.outside_models import package

timm = package("timm")


def check(model: nn.Module, size: int, folder: Path) -> None:
    """Quantize a model to W8A8 and run it everywhere: nothing but products of activations stays in float."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, size, size)
    program = fxquant.prepare(fxquant.capture(model, images), Settings(bits=(8,)))
    assert not [why for why in program[Sites].refusals.values() if "product of two activations" not in why]
    program = fxquant.calibrate(program, images, progress=False)
    plan = BitAllocation({site.name: Choice(8, 8) for site in program[Sites].sites})
    simulated = fxquant.convert(program, plan)
    with torch.no_grad():
        expected = first_tensor(simulated.module(images))
        lowered = first_tensor(fxquant.lower(simulated, "fx_int8")(images))
    written = executable(fxquant.export_onnx(simulated, folder / "model.onnx"), threads=1)((images,))
    spread = float(expected.std())
    assert spread > 0
    for answer in (lowered, written):
        assert float((answer - expected).abs().mean()) < 0.2 * spread


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "test_nfnet", "test_byobnet"]
)
def test_tiny_models_of_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10)
    size = model.pretrained_cfg["input_size"][-1] if model.pretrained_cfg.get("fixed_input_size") else 64
    check(model, size, tmp_path)


@pytest.mark.parametrize("name", ["squeezenet1_1", "mnasnet0_5", "shufflenet_v2_x0_5"])
def test_models_of_torchvision(name: str, tmp_path: Path) -> None:
    models = package("torchvision.models")
    torch.manual_seed(0)
    check(models.get_model(name, weights=None, num_classes=10), 64, tmp_path)
