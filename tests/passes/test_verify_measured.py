"""Verification on real finalists: the best measured plan is kept, whatever the surrogates say."""

from __future__ import annotations

import math

import pytest
import torch
from torch.fx import GraphModule

from fxquant.core.errors import PipelineError
from fxquant.core.facts import BitAllocation, Budget, Finalists
from fxquant.core.ir import FakeQuantize, Program
from fxquant.core.run import LOSSES, CalibrationSet, model_outputs
from fxquant.flow import pipeline
from fxquant.passes import AllocateBits, VerifyAndRefine
from tests.programs import check_pass, uniform
from tests.scoring import inputs, scored, traced

IMAGES = CalibrationSet(inputs("plain", 10))


def simulate(plan: BitAllocation) -> GraphModule:
    return pipeline.simulate(scored("plain"), plan).module


def with_plans(**widths: int) -> Program:
    program = scored("plain")
    plans = {name: BitAllocation(uniform(program, bits), estimator=name) for name, bits in widths.items()}
    return program.with_facts(Finalists(plans), plans[next(iter(plans))])


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_the_least_measured_loss_wins(loss: str) -> None:
    program = AllocateBits(Budget(average_bits=4.5))(scored("plain"))
    found = check_pass(VerifyAndRefine(IMAGES, simulate, loss), program)[BitAllocation]
    plans = program[Finalists].plans
    reference = model_outputs(traced("plain").module, IMAGES.inputs)
    for name, plan in plans.items():
        by_hand = LOSSES[loss](reference, model_outputs(simulate(plan), IMAGES.inputs), None).mean()
        assert found.finalists[name] == pytest.approx(float(by_hand), rel=1e-4, abs=1e-10)
    winner = min(found.finalists, key=lambda name: found.finalists[name])
    assert found.measured_loss == found.finalists[winner]
    assert found.choices == plans[winner].choices


def test_a_bad_favourite_loses_to_a_uniform_plan() -> None:
    found = VerifyAndRefine(IMAGES, simulate)(with_plans(favourite=2, other=8))[BitAllocation]
    assert found.estimator == "other"
    assert found.finalists["favourite"] > found.finalists["other"]


def test_a_plan_without_a_loss_is_never_the_best_and_can_be_saved() -> None:
    def break_one(plan: BitAllocation) -> GraphModule:
        module = simulate(plan)
        if plan.estimator == "broken":
            for each in module.modules():
                if isinstance(each, FakeQuantize):
                    each.register_forward_hook(lambda _module, _inputs, output: torch.full_like(output, math.nan))
        return module

    found = VerifyAndRefine(IMAGES, break_one)(with_plans(broken=8, sound=4))[BitAllocation]
    assert math.isnan(found.finalists["broken"])
    assert found.estimator == "sound"
    assert found.to_json()["finalists"]["broken"] is None
    assert math.isnan(BitAllocation.from_json(found.to_json()).finalists["broken"])


def test_without_finalists() -> None:
    with pytest.raises(PipelineError, match="reads Finalists"):
        VerifyAndRefine(IMAGES, simulate)(scored("plain"))
