from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.fx import GraphModule

from fxquant.core.facts import BitAllocation, Finalists, SensitivityMatrix, Surrogates
from fxquant.core.ir import Program, Sites
from fxquant.core.run import LOSSES, CalibrationSet, model_outputs
from fxquant.passes import EstimateCost, InsertFakeQuant, VerifyAndRefine, measured_loss
from tests.models import MODELS
from tests.programs import TARGET, calibrated, check_pass, uniform

IMAGES = CalibrationSet(MODELS["residual"].inputs(6))
PROGRAM = "residual"


def plans(**bits: int) -> dict[str, BitAllocation]:
    return {name: BitAllocation(uniform(calibrated(PROGRAM), width), status="uniform") for name, width in bits.items()}


def with_plans(found: dict[str, BitAllocation]) -> Program:
    program = EstimateCost(TARGET)(calibrated(PROGRAM))
    candidates = program[Sites].candidates
    nothing = np.zeros((len(candidates), len(candidates)))
    matrix = SensitivityMatrix(candidates, nothing, nothing, "none", 0.0, "KL nats")
    return program.with_facts(Surrogates({"none": matrix}), Finalists(found))


class Simulator:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, plan: BitAllocation) -> GraphModule:
        self.calls += 1
        return InsertFakeQuant()(calibrated(PROGRAM).with_facts(plan)).module


def test_the_measured_loss_decides() -> None:
    simulate = Simulator()
    program = with_plans(plans(narrow=2, wide=8, middle=4))
    plan = check_pass(VerifyAndRefine(IMAGES, simulate), program)[BitAllocation]
    assert set(plan.choices.values()) == set(uniform(program, 8).values())
    assert list(plan.finalists) == ["narrow", "wide", "middle"]
    assert plan.measured_loss == plan.finalists["wide"] == min(plan.finalists.values())
    assert plan.finalists["wide"] < plan.finalists["middle"] < plan.finalists["narrow"]
    assert plan.status == "uniform"


def test_equal_plans_are_measured_once_and_the_first_wins() -> None:
    simulate = Simulator()
    same = plans(first=4, second=4)
    program = with_plans(same)
    plan = VerifyAndRefine(IMAGES, simulate)(program)[BitAllocation]
    assert simulate.calls == 1
    assert plan.finalists["first"] == plan.finalists["second"]
    assert plan.choices == same["first"].choices


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_the_loss_is_a_mean_over_images_whatever_the_batch(batch: int) -> None:
    module = Simulator()(plans(p=4)["p"])
    reference = model_outputs(calibrated(PROGRAM).module, IMAGES.inputs)
    with torch.no_grad():
        expected = float(LOSSES["kl"](reference, module(*IMAGES.inputs), None).mean())
    assert measured_loss(module, IMAGES, reference, "kl", batch) == pytest.approx(expected, rel=1e-3)
