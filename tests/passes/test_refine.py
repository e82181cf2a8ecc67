"""Refinement by swaps: real networks, and a made-up measurement whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, Budget, CostTables, Finalists, Surrogates, agrees, fits, usage
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import CalibrationSet
from fxquant.passes import AllocateBits, Meter, VerifyAndRefine, is_better, meter
from fxquant.passes.allocation import border_cost, borders_of, one_hot
from tests.programs import check_pass
from tests.scoring import inputs, scored

IMAGES = CalibrationSet(inputs("plain", 12))
Losses = Callable[[dict[str, Choice]], Tensor]


def fits_and_agrees(program: Program, plan: BitAllocation, budget: Budget) -> bool:
    return fits(plan.choices, budget.limits, program[CostTables]) and agrees(program[Sites].sites, plan.choices)


@pytest.mark.parametrize(
    "budget", [Budget(average_bits=a) for a in (3.0, 4.0, 5.0)] + [Budget(size_ratio=0.35)], ids=str
)
def test_never_worse_than_a_finalist_and_within_the_budget(budget: Budget) -> None:
    program = AllocateBits(budget)(scored("plain"))
    measures = Meter(program, IMAGES, "kl")
    before = VerifyAndRefine(measures)(program)[BitAllocation]
    plan = check_pass(VerifyAndRefine(measures, moves=12), program)[BitAllocation]
    assert plan.measured_loss is not None
    assert before.measured_loss is not None
    assert plan.measured_loss <= min(plan.finalists.values()) == plan.finalists.get("refined", before.measured_loss)
    assert plan.measured_loss <= before.measured_loss
    assert fits_and_agrees(program, plan, budget)
    assert (plan.choices == before.choices) == ("refined" not in plan.finalists)


class Measured:
    """Stands in for networks: losses by a formula, and what was asked for."""

    def __init__(self, losses: Losses) -> None:
        self.formula = losses
        self.asked: list[dict[str, Choice]] = []
        self.plan = BitAllocation({"x": Choice(8, 8)})

    def simulate(self, program: Program, plan: BitAllocation) -> Program:
        self.plan = plan
        return program

    def losses(self, *_: object) -> Tensor:
        self.asked.append(self.plan.choices)
        return self.formula(self.plan.choices)


def refined(
    monkeypatch: pytest.MonkeyPatch, losses: Losses, program: Program, **options: Any
) -> tuple[BitAllocation, Measured]:
    measured = Measured(losses)
    monkeypatch.setattr(meter, "image_losses", measured.losses)
    monkeypatch.setattr(meter, "simulate", measured.simulate)
    step = replace(VerifyAndRefine(Meter(program, IMAGES, "kl"), moves=50), **options)
    return step(program)[BitAllocation], measured


def with_start(program: Program, budget: Budget, choices: dict[str, Choice], estimator: str = "gram") -> Program:
    used = usage(choices, budget.limits, program[CostTables])
    plan = BitAllocation(choices, estimator, status="optimal", bound=0.0, gap=0.0, used=used, limits=budget.limits)
    return program.with_facts(Finalists({estimator: plan}), plan)


def distance(wanted: dict[str, Choice]) -> Losses:
    """Return a loss that counts the bits missing at each site, the same for all images but for a small known noise."""
    noise = torch.linspace(-0.01, 0.01, 16, dtype=torch.float64)

    def losses(choices: dict[str, Choice]) -> Tensor:
        return sum(abs(math.log2(wanted[s].weight_bits / c.weight_bits)) for s, c in choices.items()) + noise

    return losses


NAMES = ("conv1", "conv2", "conv3", "fc")
NARROW = dict.fromkeys(NAMES, Choice(2, 8))


def test_a_wrong_start_is_mended_swap_by_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every precision wrong: two sites have to trade, which no change of a single site within the budget can do."""
    program, sites = scored("plain"), scored("plain")[Sites]
    wanted = {**NARROW, "conv2": Choice(8, 8), "fc": Choice(4, 8)}
    start = {**NARROW, "conv3": Choice(8, 8), "fc": Choice(4, 8)}
    assert sites.by_name("conv2").weight_count == sites.by_name("conv3").weight_count
    limit = program[CostTables]["average_bits"].of(start)
    plan, measured = refined(
        monkeypatch, distance(wanted), with_start(program, Budget(average_bits=limit), start), patience=50
    )
    assert plan.choices == wanted
    assert plan.measured_loss == pytest.approx(0.0, abs=1e-12)
    assert plan.finalists == pytest.approx({"gram": 4.0, "refined": 0.0}, abs=1e-12)
    assert (plan.estimator, plan.status) == ("gram, refined", "measured")
    assert math.isnan(plan.bound)
    assert plan.objective == program[Surrogates].matrices["gram"].predict(wanted)
    assert plan.used == {"average_bits": pytest.approx(limit)}
    keys = [tuple(sorted(choices.items())) for choices in measured.asked]
    assert len(keys) == len(set(keys)), "no plan is measured twice"
    assert all(fits(choices, {"average_bits": limit}, program[CostTables]) for choices in measured.asked)


def test_a_rough_loss_is_that_of_the_first_images_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 images 8 are run, whose losses are half of the others' for every plan: 1.75 times as much on all."""
    program = scored("plain")
    plans = {bits: BitAllocation(dict.fromkeys(NAMES, Choice(bits, 8))) for bits in (2, 4, 8)}
    measured = Measured(lambda _: torch.empty(0))
    run: list[int] = []

    def losses(_module: object, _images: object, _reference: object, _loss: object, only: Tensor) -> Tensor:
        run.append(len(only))
        share = 1.0 if len(only) == 8 else 2.0
        return torch.full((len(only),), share * measured.plan.choices["fc"].weight_bits, dtype=torch.float64)

    monkeypatch.setattr(meter, "image_losses", losses)
    monkeypatch.setattr(meter, "simulate", measured.simulate)
    few, many = (Meter(program, CalibrationSet(inputs("plain", count)), "kl") for count in (32, 12))
    loss, count = few.rough(plans[2], plans[8])
    assert (loss, count) == (2 * 1.75, 8)
    assert run == [8, 24, 8], "the known plan on all images, the other one on the first"
    assert few.rough(plans[8], plans[8]) == (8 * 1.75, 32)
    run.clear()
    assert many.rough(plans[4], plans[8]) == (8.0, 12), "too few images to leave any out"
    assert run == [12]
    assert not few.knows(plans[2].choices), "a rough loss decides nothing"


def test_a_finalist_that_is_clearly_worse_is_run_on_the_first_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    program = scored("plain")
    plans = {f"W{bits}": BitAllocation(dict.fromkeys(NAMES, Choice(bits, 8))) for bits in (4, 2, 8)}
    measured, run = Measured(lambda _: torch.empty(0)), list[tuple[float, int]]()

    def losses(_module: object, _images: object, _reference: object, _loss: object, only: Tensor) -> Tensor:
        bits = measured.plan.choices["fc"].weight_bits
        run.append((bits, len(only)))
        return torch.full((len(only),), 1.0 / bits, dtype=torch.float64)

    monkeypatch.setattr(meter, "image_losses", losses)
    monkeypatch.setattr(meter, "simulate", measured.simulate)
    judge = Meter(program, CalibrationSet(inputs("plain", 32)), "kl")
    plan = VerifyAndRefine(judge)(program.with_facts(Finalists(plans), plans["W4"]))[BitAllocation]
    assert run == [(4, 8), (4, 24), (2, 8), (8, 8), (8, 24)]
    assert plan.choices == plans["W8"].choices
    assert plan.finalists == {"W4": 0.25, "W2": 0.5, "W8": 0.125}


def test_activations_that_are_tied_move_together(monkeypatch: pytest.MonkeyPatch) -> None:
    program = scored("plain", (8,), (4, 8))
    start = dict.fromkeys(NAMES, Choice(8, 4))

    def losses(choices: dict[str, Choice]) -> Tensor:
        return torch.full((4,), float(sum(c.activation_bits == 4 for c in choices.values())))

    plan, measured = refined(monkeypatch, losses, with_start(program, Budget(average_bits=8), start))
    assert set(plan.choices.values()) == {Choice(8, 8)}
    assert all(agrees(program[Sites].sites, choices) for choices in measured.asked)


def test_noise_is_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change is better by 0.1 per site, and by +3 or -3 more from image to image: over 16 images that is noise."""
    program = with_start(scored("plain"), Budget(average_bits=8), NARROW)
    swing = torch.tensor([1.0, -1.0] * 8, dtype=torch.float64)

    def losses(choices: dict[str, Choice], noise: float) -> Tensor:
        changed = sum(choice != Choice(2, 8) for choice in choices.values())
        return 1.0 - 0.1 * changed + noise * swing * (changed > 0)

    noisy, measured = refined(monkeypatch, lambda choices: losses(choices, 3.0), program, patience=5)
    assert noisy.choices == NARROW
    assert (noisy.status, noisy.estimator, noisy.finalists) == ("optimal", "gram", {"gram": 1.0})
    assert len(measured.asked) == 1 + 5, "patience ends the search"
    calm, _ = refined(monkeypatch, lambda choices: losses(choices, 0.0), program)
    assert Choice(2, 8) not in calm.choices.values()


@pytest.mark.parametrize("moves", [0, 1, 3])
def test_no_more_is_measured_than_asked_for(monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    program = with_start(scored("plain"), Budget(average_bits=8), NARROW)
    plan, measured = refined(monkeypatch, distance(dict.fromkeys(NAMES, Choice(8, 8))), program, moves=moves)
    assert len(measured.asked) == 1 + moves
    assert ("refined" in plan.finalists) == (moves > 0)


def test_a_price_on_borders_counts_with_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    program = scored("plain", (8,), (4, 8))
    start = with_start(program, Budget(average_bits=8), dict.fromkeys(NAMES, Choice(8, 4)))

    def losses(choices: dict[str, Choice]) -> Tensor:
        return torch.full((4,), 1.0 - 0.1 * (choices["conv1"].activation_bits == 8))

    cheap, _ = refined(monkeypatch, losses, start, requantization_cost=0.01)
    assert cheap.choices["conv1"] == Choice(8, 8)
    borders = borders_of(program, 0.01)
    assert cheap.border_cost == border_cost(borders, one_hot(program[Sites].candidates, cheap.choices))
    dear, _ = refined(monkeypatch, losses, start, requantization_cost=1.0)
    assert len({choice.activation_bits for choice in dear.choices.values()}) == 1
    assert dear.border_cost == 0.0


def test_the_total_of_loss_and_borders_picks_the_finalist(monkeypatch: pytest.MonkeyPatch) -> None:
    program, budget = scored("plain"), Budget(average_bits=8)
    one = with_start(program, budget, NARROW)[BitAllocation]
    other = replace(one, choices={**NARROW, "fc": Choice(8, 8)}, border_cost=5.0)
    both = program.with_facts(Finalists({"other": other, "one": one}))
    plan, _ = refined(monkeypatch, distance(dict.fromkeys(NAMES, Choice(8, 8))), both, moves=0)
    assert plan.choices == NARROW


def test_better_is_beyond_one_standard_error() -> None:
    now = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    fall = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    error = float(np.std(fall.numpy(), ddof=1)) / 2
    assert is_better(now, now - fall)
    assert is_better(now, now - fall, 0.5 - error - 1e-9)
    assert not is_better(now, now - fall, 0.5 - error + 1e-9)
    assert not is_better(now, now)
    assert not is_better(now, now + fall)
    assert not is_better(now, now * math.nan)
    assert not is_better(now[:1], now[:1] - 9), "one image has no noise to compare with"


@pytest.mark.parametrize("change", [{"moves": -1}, {"patience": 0}])
def test_settings_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="must be at least 0 and patience"):
        VerifyAndRefine(Meter(scored("plain"), IMAGES, "kl"), **change)


def test_an_acceptance_renews_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other plan is better: two rejections in a row never come, though there are many in all."""
    calls: list[float] = []

    def losses(choices: dict[str, Choice]) -> Tensor:
        del choices
        calls.append(10.0 - len(calls) if len(calls) % 2 == 0 else 100.0)
        return torch.full((4,), calls[-1], dtype=torch.float64)

    start = with_start(scored("plain"), Budget(average_bits=8), NARROW)
    plan, _ = refined(monkeypatch, losses, start, patience=2, moves=9)
    assert len(calls) == 10
    assert plan.measured_loss == min(calls)
