"""Models of Hugging Face and Lightning as plain modules, where they are installed, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.onnx import executable
from tests.outside_models import package

CLASSIFY = "ForImageClassification"
DEPTH = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_labels": 5}
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
HEADS = {"num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT": (CLASSIFY, {**VIT, "image_size": 32, "num_labels": 5}, 32),
    "ResNet": (CLASSIFY, {**RESNET, "num_labels": 5}, 32),
    "MobileNetV2": (CLASSIFY, {"depth_multiplier": 0.25, "num_labels": 5}, 32),
    "ConvNext": (CLASSIFY, DEPTH, 32),
    "Segformer": ("ForSemanticSegmentation", {**DEPTH, **HEADS}, 64),
}
"""Family -> head, configuration, pixels."""


@pytest.mark.parametrize("family", CASES)
def test_a_vision_model_of_hugging_face(family: str, tmp_path: Path) -> None:
    transformers = package("transformers")
    head, options, size = CASES[family]
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**options)).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
            norm.train()
    images = torch.randn(8, 3, size, size)
    with torch.no_grad():
        model(images)
        shape = model.eval()(images).logits.shape
    batches = [{"pixel_values": images, "labels": torch.zeros(8, dtype=torch.long)}]
    result = fxquant.quantize(model, batches, None, bits=(8,), effort="fast", progress=False)
    with torch.no_grad():
        answers = [graph(images) for graph in (result.lowered, fxquant.lower(result, "fx_int8"))]
        expected = result.simulated(images).logits
    assert {type(answer) for answer in answers} == {type(model(images))}
    written = result.to_onnx(tmp_path / "model.onnx")
    spread = float(expected.std())
    for logits in (*(answer.logits for answer in answers), executable(written.path, threads=1)((images,))):
        assert logits.shape == shape
        assert float((logits - expected).abs().mean()) < 0.3 * spread
    result.save(tmp_path / "saved")
    assert fxquant.load(tmp_path / "saved").simulated(images).logits.shape == shape


def test_a_lightning_module() -> None:
    lightning = package("lightning")

    class Classifier(lightning.LightningModule):  # type: ignore
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            del number
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.net(x)
            return answer

    model, images = Classifier(), torch.randn(8, 3, 8, 8)
    result = fxquant.quantize(model, images, None, bits=(8,), effort="fast", progress=False)
    assert result.lowered(images).shape == (8, 3)
    with pytest.raises(RuntimeError, match="not attached"):
        _ = model.trainer
