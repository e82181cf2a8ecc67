from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant import flow
from fxquant.core.errors import CalibrationError, InfeasibleBudgetError, InputError
from fxquant.core.facts import EFFORTS, BitAllocation, Budget, CostTables, EffortName, Settings, usage
from fxquant.core.host import Reporter
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import CalibrationSet, model_outputs, quality
from fxquant.flow import cheapest, choose, judged_on, score
from fxquant.passes import MeasureSensitivity, simulate
from fxquant.report import summary
from tests.scoring import inputs, scored
from tests.small import images, small

HELD_OUT = CalibrationSet(inputs("plain", 16))


def cost(program: Program, name: str = "size_ratio") -> float:
    return usage(program[BitAllocation].choices, {name: 1.0}, program[CostTables])[name]


def loss_at(**limits: float) -> float:
    """Return the loss that the best plan within limits on costs is shown to keep."""
    found = choose(scored("plain"), Budget.of(limits), HELD_OUT)
    graphs = (found.module, simulate(found, found[BitAllocation]).module)
    reference, output = (model_outputs(graph, HELD_OUT.inputs) for graph in graphs)
    return quality(("loss",), reference, output, None, "kl")["loss"].bound


def test_the_cheapest_plan_that_keeps_the_loss_is_found() -> None:
    """Every plan of a handful of layers is measured: none that is cheaper by more than the tolerance keeps it."""
    program = scored("plain")
    limit = loss_at(average_bits=4.5)
    found = choose(program, Budget(loss=limit * 1.001), HELD_OUT)
    plan = found[BitAllocation]
    assert plan.quality["loss"] < plan.quality_bounds["loss"] <= limit * 1.001
    assert (plan.quality_images, plan.images) == (16, 32)
    assert plan.quality_limits == {"loss": limit * 1.001}
    assert cost(found) <= cost(choose(program, Budget(average_bits=4.5), HELD_OUT)) * 1.01


def test_tighter_limits_cost_more() -> None:
    program = scored("plain")
    loose, tight = (choose(program, Budget(loss=value), HELD_OUT) for value in (2.0, loss_at(average_bits=7)))
    assert cost(loose) < cost(tight)


def test_a_limit_every_plan_keeps_gives_the_cheapest_plan() -> None:
    found = choose(scored("plain"), Budget(disagreement=1, minimize="average_bits"), HELD_OUT)
    assert set(found[BitAllocation].choices.values()) == {Choice(2, 8)}
    assert found[BitAllocation].used["average_bits"] == pytest.approx(2)


def test_limits_on_costs_hold_along_with_it() -> None:
    found = choose(scored("plain"), Budget(loss=2.0, bops_ratio=0.05, average_bits=6), HELD_OUT)
    assert found[BitAllocation].used["bops_ratio"] <= 0.05
    assert found[BitAllocation].used["average_bits"] <= 6


def test_a_limit_no_plan_keeps_names_the_best() -> None:
    with pytest.raises(
        InfeasibleBudgetError,
        match=r"no plan keeps loss=1e-12.*widest measured loss .* \(at most .* at 95 %\); raise the",
    ):
        choose(scored("plain"), Budget(loss=1e-12), HELD_OUT)
    with pytest.raises(InfeasibleBudgetError, match="average_bits=1"):
        choose(scored("plain"), Budget(loss=1.0, average_bits=1), HELD_OUT)


def test_answers_need_images_and_labels() -> None:
    with pytest.raises(CalibrationError, match="a limit on loss needs held-out images"):
        choose(scored("plain"), Budget(loss=1.0), None)
    with pytest.raises(CalibrationError, match="one label for each image"):
        choose(scored("plain"), Budget(accuracy_drop=0.1), HELD_OUT)


@pytest.mark.parametrize(
    ("budget", "count", "message"),
    [
        ({"accuracy_drop": 0.1}, 24, "one label for each image"),
        (
            {"disagreement": 0.01},
            24,
            "at least 299 held-out images, .* are 12; give 598 calibration images",
        ),
        ({"loss": 0.1}, 4, "needs at least 10 held-out images"),
        ({"disagreement": 0}, 24, "disagreement=0 at 95 % confidence cannot be shown by any number of images"),
    ],
)
def test_what_the_images_cannot_show_is_said_before_the_work(
    budget: dict[str, float], count: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "prepare", lambda *_: pytest.fail("worked first"))
    with pytest.raises(InputError, match=message):
        fxquant.quantize(small(), images(count), budget, target="reference", progress=False)


def test_two_images_show_nothing() -> None:
    """At 2 bits no answer of two images changes, which says little: the plan is refused, not taken."""
    two, settings = CalibrationSet(inputs("plain", 2)), scored("plain")[Settings]
    # Both of them, and both mixed with the other.
    assert choose(scored("plain"), Budget(average_bits=8), two)[BitAllocation].images == 4
    with pytest.raises(CalibrationError, match="at least 14 held-out images"):
        choose(scored("plain"), Budget(disagreement=0.2), two)
    doubtful = scored("plain").with_facts(replace(settings, confidence=0.3))
    assert choose(doubtful, Budget(disagreement=0.2), two)[BitAllocation].quality["disagreement"] == 0


def test_answers_are_judged_on_more_images_than_plans_are_compared_on() -> None:
    settings = Settings(effort="fast")
    for count, budget, scoring, held_out in (
        (96, None, 72, 24),
        (40, {"disagreement": 0.5}, 20, 20),
        (200, {"disagreement": 0.5}, 72, 24),
        (96, {"disagreement": 0.05}, 48, 48),
        (400, {"disagreement": 0.05}, 72, 236),
    ):
        limits = None if budget is None else Budget.of(budget)
        every = CalibrationSet((torch.arange(float(count))[:, None],))
        parts = flow.split_images(every, limits, settings)
        assert tuple(map(len, parts)) == (scoring, held_out)
        numbers = torch.cat([part.inputs[0] for part in parts])
        assert len(set(numbers.flatten().tolist())) == len(numbers)
        compared = flow.split_images(every.slice(0, 96), None, settings)[1]
        assert torch.equal(parts[1].inputs[0][: len(compared)], compared.inputs[0])


def test_large_networks_are_judged_on_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    program = scored("plain")
    image = sum(site.macs for site in program[Sites].sites)
    parts = [CalibrationSet(inputs("plain", count)) for count in (48, 16)]

    def count(work: float, fewest: int, effort: EffortName = "default") -> int:
        known = {"default": replace(EFFORTS["default"], work=work, least_judged=fewest), "best": EFFORTS["best"]}
        monkeypatch.setattr(score, "EFFORTS", known)
        found = judged_on(program.with_facts(replace(program[Settings], effort=effort)), *parts)
        assert found is not None
        return len(found)

    whole = 48 + 16 + 16
    assert count(math.inf, 10) == count(whole * image, 10) == count(0, 500) == whole
    assert count(30 * image, 10) == 30
    assert count(5 * image, 10) == 10
    assert count(0, 10, effort="best") == whole


@pytest.mark.parametrize(
    ("estimators", "affordable", "fewest", "most", "seen"),
    [
        (("gram",), 1000, 4, 96, 40),
        (("gram",), 1000, 4, 20, 20),
        (("gram",), 12, 4, 96, 12),
        (("gram", "fisher_out"), 1, 4, 96, 4),
        (("gram",), 1, 50, 96, 40),
        (("fisher_out",), 1000, 4, 96, 40),
        (("fisher_out",), 12, 4, 96, 12),
    ],
)
def test_large_networks_are_scored_on_fewer_images(
    monkeypatch: pytest.MonkeyPatch, estimators: tuple[str, ...], affordable: int, fewest: int, most: int, seen: int
) -> None:
    """A candidate runs half of the network, or beside a backward pass its own layer once."""
    program, counts = scored("plain"), list[int]()
    sites = program[Sites]
    formats = len(sites.sites[0].choices)
    assert all(len(site.choices) == formats for site in sites.sites)
    passes = len(sites.candidates) / 2 if "gram" in estimators else score.GRADIENT_RUNS + formats
    work = (affordable + 0.5) * passes / score.SCORED_PLANS * sum(site.macs for site in sites.sites)
    effort = replace(EFFORTS["default"], work=work, scored=most, least_scored=fewest)

    class Counted(MeasureSensitivity):
        def run(self, program: Program) -> tuple[Program, int]:
            counts.append(len(self.images))
            return super().run(program)

    monkeypatch.setattr(score, "EFFORTS", {"default": effort})
    monkeypatch.setattr(score, "MeasureSensitivity", Counted)
    score.score(program, CalibrationSet(inputs("plain", 40)), estimators, None)
    assert counts == [seen]


def test_images_learned_by_heart_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    def sure() -> nn.Module:
        model = small()
        with torch.no_grad():
            model.get_parameter("head.weight").mul_(1e4)
        return model

    given: dict[str, Any] = {"target": "reference", "effort": "fast"}
    result = fxquant.quantize(sure(), images(40), {"average_bits": 5}, **given)
    assert "the float model is more than 99 % sure" in capsys.readouterr().err
    assert "Note: the float model is more than 99 % sure of its answer to 1" in summary(result.program)
    assert result.report_data()["outcome"]["notes"] == list(result.allocation.notes)
    quiet = fxquant.quantize(small(), images(40), {"average_bits": 5}, progress=False, **given)
    assert not quiet.allocation.notes


def test_answers_are_judged_as_the_plan_is_handed_back() -> None:
    """A finish that spoils every plan leaves none that keeps the limit by it; the plain plan is taken where it does."""
    program = scored("plain")
    limit = loss_at(average_bits=5)

    def spoil(solved: Program) -> Program:
        narrow = {site.name: Choice(2, 8) for site in solved[Sites].sites}
        return solved.with_facts(BitAllocation(narrow))

    found = choose(program, Budget(loss=limit * 1.01), HELD_OUT, finish=spoil)
    assert found[BitAllocation].quality["loss"] <= limit * 1.01
    assert set(found[BitAllocation].choices.values()) != {Choice(2, 8)}
    assert simulate(found, found[BitAllocation]).module is not None


def test_a_plan_scored_around_itself_that_breaks_the_limit_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, solve = loss_at(average_bits=4.5) * 4, cheapest.search.allocate

    def breaking(
        program: Program, budget: Budget, held_out: Any, reporter: Any, around: Any = None, *others: Any, **named: Any
    ) -> Program:
        solved = solve(program, budget, held_out, reporter, None, *others, **named)
        narrow = {site.name: Choice(2, 8) for site in program[Sites].sites}
        return solved if around is None else solved.with_facts(replace(solved[BitAllocation], choices=narrow))

    monkeypatch.setattr(cheapest.search, "allocate", breaking)
    found = choose(scored("plain"), Budget(loss=limit), HELD_OUT, Reporter(False), HELD_OUT)
    assert found[BitAllocation].quality["loss"] <= limit


def test_each_step_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    choose(scored("plain"), Budget(loss=2.0), HELD_OUT, Reporter(True))
    printed = capsys.readouterr().err
    assert "size_ratio within" in printed
    assert "on 16 held-out images, kept" in printed


def test_from_the_front_door_to_the_summary() -> None:
    budget = Budget(disagreement=0.2)
    # Two of 28 changed answers are 7 %, of images like them at most 21 %: one may change.
    result = fxquant.quantize(small(), images(56), budget, target="reference", effort="fast", progress=False)
    plan = result.allocation
    assert plan.quality["disagreement"] < plan.quality_bounds["disagreement"] <= 0.2
    assert (plan.quality_images, plan.images) == (28, 76)
    assert "at 95 % confidence from 28 images" in " ".join(summary(result.program).split())
    again = BitAllocation.from_json(result.allocation.to_json())
    assert again.quality == result.allocation.quality
    loose = fxquant.resolve(result, Budget(disagreement=1), progress=False)
    assert loose.allocation.quality_limits == {"disagreement": 1}
