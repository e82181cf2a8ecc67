"""Verification on real finalists: the best measured plan is kept, whatever the surrogates say."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.core.errors import PipelineError
from fxquant.core.facts import BitAllocation, Budget, Finalists
from fxquant.core.ir import FakeQuantize, Program
from fxquant.core.run import LOSSES, CalibrationSet, model_outputs
from fxquant.passes import AllocateBits, Meter, VerifyAndRefine, measured_loss, meter, simulate
from tests.programs import check_pass, uniform
from tests.scoring import inputs, scored, traced

IMAGES = CalibrationSet(inputs("plain", 10))


def verified(program: Program) -> Program:
    return VerifyAndRefine(Meter(program, IMAGES, "kl"))(program)


def with_plans(**widths: int) -> Program:
    program = scored("plain")
    plans = {name: BitAllocation(uniform(program, bits), estimator=name) for name, bits in widths.items()}
    return program.with_facts(Finalists(plans), plans[next(iter(plans))])


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_the_least_measured_loss_wins(loss: str) -> None:
    program = AllocateBits(Budget(average_bits=4.5))(scored("plain"))
    found = check_pass(VerifyAndRefine(Meter(program, IMAGES, loss)), program)[BitAllocation]
    plans = program[Finalists].plans
    assert list(found.finalists) == list(plans)
    reference = model_outputs(traced("plain").module, IMAGES.inputs)
    for name, plan in plans.items():
        answer = model_outputs(simulate(scored("plain"), plan).module, IMAGES.inputs)
        by_hand = LOSSES[loss](reference, answer, None).mean()
        assert found.finalists[name] == pytest.approx(float(by_hand), rel=1e-4, abs=1e-10)
    winner = min(found.finalists, key=lambda name: found.finalists[name])
    assert found.measured_loss == found.finalists[winner]
    assert found.choices == plans[winner].choices
    assert found.status == plans[winner].status


def test_a_bad_favourite_loses_to_a_uniform_plan() -> None:
    found = verified(with_plans(favourite=2, other=8, middle=4))[BitAllocation]
    assert found.estimator == "other"
    assert found.finalists["favourite"] > found.finalists["middle"] > found.finalists["other"]


def test_equal_plans_are_measured_once_and_the_first_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[BitAllocation] = []

    def counted(program: Program, plan: BitAllocation) -> Program:
        measured.append(plan)
        return simulate(program, plan)

    monkeypatch.setattr(meter, "simulate", counted)
    plan = verified(with_plans(first=4, second=4))[BitAllocation]
    assert len(measured) == 1
    assert plan.finalists["first"] == plan.finalists["second"]
    assert plan.estimator == "first"


def test_a_plan_without_a_loss_is_never_the_best_and_can_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_one(program: Program, plan: BitAllocation) -> Program:
        simulated = simulate(program, plan)
        if plan.estimator == "broken":
            for each in simulated.module.modules():
                if isinstance(each, FakeQuantize):
                    each.register_forward_hook(lambda _module, _inputs, output: torch.full_like(output, math.nan))
        return simulated

    monkeypatch.setattr(meter, "simulate", break_one)
    found = verified(with_plans(broken=8, sound=4))[BitAllocation]
    assert math.isnan(found.finalists["broken"])
    assert found.estimator == "sound"
    assert found.to_json()["finalists"]["broken"] is None
    assert math.isnan(BitAllocation.from_json(found.to_json()).finalists["broken"])


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_the_loss_is_a_mean_over_images_whatever_the_batch(batch: int) -> None:
    module = simulate(scored("plain"), with_plans(p=4)[BitAllocation]).module
    reference = model_outputs(traced("plain").module, IMAGES.inputs)
    with torch.no_grad():
        expected = float(LOSSES["kl"](reference, module(*IMAGES.inputs), None).mean())
    found = LOSSES["kl"](reference, model_outputs(module, IMAGES.inputs, batch), None).mean()
    assert float(found) == pytest.approx(expected, rel=1e-3)
    assert measured_loss(module, IMAGES, reference, "kl") == pytest.approx(expected, rel=1e-3)


def test_without_finalists() -> None:
    with pytest.raises(PipelineError, match="reads Finalists"):
        verified(scored("plain"))
