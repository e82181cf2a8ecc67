"""Recipes that train, through the front door: a killed run goes on to the same answer, and detectors are lowered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.onnx import kernel_report
from fxquant.core.facts import Rounding
from fxquant.core.run import CalibrationSet, model_outputs
from fxquant.qat import TrainingTask, training_loop
from fxquant.recipes import RECIPES
from fxquant.result import Result
from tests.small import images, small

pytest.importorskip("onnx")

TRAINING = [name for name, each in RECIPES.items() if each.training]
IMAGES = images(48)


def run(recipe: str, folder: Path | None) -> Result:
    options: dict[str, Any] = {"training_options": {"steps": 16, "batch": 8, "weight_lr": 2e-2}, "curve": 0}
    return fxquant.quantize(
        small(),
        IMAGES,
        "average_bits=4.5",
        recipe=recipe,
        target="reference",
        workdir=folder,
        progress=False,
        options=options,
    )


@pytest.mark.parametrize("recipe", TRAINING)
def test_a_killed_run_goes_on_from_its_folder_to_the_same_answer(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loop, "KEPT_EVERY", 3)
    straight = run(recipe, None)
    drawn, steps = training_loop.drawn, list[tuple[str, int]]()

    def killed(of: TrainingTask, phase: str, step: int) -> CalibrationSet:
        steps.append((phase, step))
        if len(steps) == 13:
            raise KeyboardInterrupt
        return drawn(of, phase, step)

    monkeypatch.setattr(training_loop, "drawn", killed)
    with pytest.raises(KeyboardInterrupt):
        _ = run(recipe, tmp_path)
    resumed = run(recipe, tmp_path)
    # Finished phases are not trained again, and of the one that was killed at most the step under way and two more.
    assert len(set(steps)) == 16
    assert 16 < len(steps) <= 19
    assert resumed.allocation.to_json() == straight.allocation.to_json()
    assert torch.equal(*(model_outputs(each.simulated, (IMAGES,)) for each in (straight, resumed)))


class Levels(nn.Module):
    """Two levels that share a head with its batch norm; the trained statistics fit neither of them alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = torch.relu(self.stem(x))
        coarse = nn.functional.avg_pool2d(fine, 2) * 3.0
        one, other = (self.last(torch.relu(self.norm(self.head(level)))) for level in (fine, coarse))
        return one, other


def test_a_detector_with_norms_of_each_level_runs_on_integer_kernels(tmp_path: Path) -> None:
    model = Levels()
    for _ in range(20):
        _ = model(IMAGES)
    result = fxquant.quantize(
        model.eval(),
        IMAGES,
        "average_bits=8",
        recipe="aqd",
        target="onnxruntime",
        bits=(4,),
        activation_bits=(8,),
        progress=False,
        options={"training_options": {"steps": 30, "batch": 8, "weight_lr": 1e-2}},
    )
    notes = result.program[Rounding].notes
    assert "aqd: 2 batch norms with statistics of the quantized network" in notes
    assert not any("rejected" in note for note in notes)
    report = result.to_onnx(tmp_path / "model.onnx")
    assert kernel_report(report.path).float_products == 0
    assert all(pair.within for pair in fxquant.check(result, IMAGES).pairs)
