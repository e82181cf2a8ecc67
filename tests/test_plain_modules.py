"""Modules that are more than a network, used as they are; what they look like is in `tests.unusual_models`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.backends.onnx import executable
from fxquant.core.ir import Sites
from tests.unusual_models import Classifier


def test_a_module_with_a_trainer_and_a_dataclass_for_an_answer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Classifier(), torch.randn(8, 3, 6, 6)
    result = fxquant.quantize(model, images, None, bits=(8,), effort="fast", progress=False)
    assert [site.kind for site in result.program[Sites].sites] == ["conv", "linear"]
    expected = result.simulated(images)
    for lowered in (result.lowered, fxquant.lower(result, "fx_int8")):
        answer = lowered(images)
        assert list(answer) == ["logits", "features", "loss"]
        assert answer["loss"] is None
        assert torch.allclose(answer["logits"], expected["logits"], atol=0.05)
    written = executable(result.to_onnx(tmp_path / "model.onnx").path, threads=1)((images,))
    assert torch.allclose(written, expected["logits"], atol=0.05)
    result.save(tmp_path / "saved")
    again = fxquant.load(tmp_path / "saved").simulated(images)
    assert torch.equal(again["logits"], expected["logits"])
    assert model.training
    with pytest.raises(RuntimeError, match="not attached"):
        model.training_step((images, torch.zeros(8, dtype=torch.long)), 0)
