from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant import flow
from fxquant.backends import backend
from fxquant.capture import capture
from fxquant.core.errors import FileFormatError, InfeasibleBudgetError, OptionError, PipelineError
from fxquant.core.facts import (
    BitAllocation,
    Budget,
    CostTables,
    FakeQuantNodes,
    Ranges,
    SensitivityMatrix,
    Settings,
    Surrogates,
    WeightGrids,
)
from fxquant.core.ir import FLOAT, Choice, EdgeGroups, Program, QuantizedEdges, Sites, show
from fxquant.core.run import LOSSES, CalibrationSet, judging_images, model_outputs
from fxquant.flow import Pipeline
from fxquant.passes import (
    AllocateBits,
    Calibrate,
    Canonicalize,
    CollectRanges,
    EstimateCost,
    FindEdges,
    FindSites,
    FoldBatchnorm,
    FoldConstants,
    InsertFakeQuant,
    InsertObservers,
    MeasureSensitivity,
    Meter,
    Pass,
    ScaleWeights,
    TieEdges,
    VerifyAndRefine,
    simulate,
    widest_plan,
)
from tests.models import MODELS, built
from tests.programs import captured, check_pass
from tests.scoring import calibrated, inputs, scored, traced

TARGET = backend("reference").target
IMAGES = CalibrationSet(MODELS["residual"].inputs(6))


ORDER: tuple[Pass, ...] = (
    Canonicalize(),
    FoldConstants(),
    FoldBatchnorm(),
    FindEdges(TARGET),
    TieEdges(),
    FindSites(TARGET, (2, 4, 8), (8,)),
    InsertObservers("mse"),
    Calibrate(IMAGES),
    CollectRanges(),
    ScaleWeights(),
    EstimateCost(TARGET),
)


def verify(program: Program) -> VerifyAndRefine:
    return VerifyAndRefine(Meter(program, IMAGES, "kl"))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ((TieEdges(),), r"pass 0 \(TieEdges\) reads QuantizedEdges before any pass writes it"),
        ((FindEdges(TARGET), FindSites(TARGET, (8,), (8,)), TieEdges()), r"pass 1 \(FindSites\) reads EdgeGroups"),
        ((*ORDER[:6], ORDER[9], InsertFakeQuant()), r"pass 7 \(InsertFakeQuant\) reads Ranges"),
        ((*ORDER, AllocateBits(Budget(average_bits=4))), r"pass 11 \(AllocateBits\) reads Surrogates"),
        ((*ORDER, verify(scored("residual"))), r"pass 11 \(VerifyAndRefine\) reads Finalists"),
    ],
)
def test_a_wrong_order_fails_when_the_pipeline_is_built(passes: tuple[Pass, ...], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Pipeline(passes)


def test_facts_that_are_given_need_not_be_written() -> None:
    Pipeline((TieEdges(),), frozenset({QuantizedEdges}))
    with pytest.raises(PipelineError, match="reads Sites"):
        flow.run(captured("residual"), ScaleWeights())


def test_every_pass_leaves_its_input_alone_and_can_run_twice() -> None:
    program = captured("residual")
    tail = (MeasureSensitivity(IMAGES, ("gram", "diagonal")), AllocateBits(Budget(average_bits=4)))
    plan = widest_plan(scored("residual"))
    for step in (*ORDER, InsertFakeQuant(), *tail):
        program = program.with_facts(plan) if isinstance(step, InsertFakeQuant) else program
        done = check_pass(step, program)
        again = check_pass(step, program)
        assert show(again.module) == show(done.module), step
        assert type(again.facts) is type(done.facts)
        assert list(again.facts) == list(done.facts)
        program = done
    twice = scored("residual")
    for step in (ScaleWeights(), EstimateCost(TARGET), AllocateBits(Budget(average_bits=4))):
        twice = check_pass(step, check_pass(step, twice))
    check_pass(verify(twice), check_pass(verify(twice), twice))


@pytest.mark.parametrize(
    "step",
    [Canonicalize(), FoldConstants(), FoldBatchnorm(), FindEdges(TARGET), TieEdges()],
    ids=lambda s: type(s).__name__,
)
def test_the_second_time_there_is_nothing_left_to_rewrite(step: Pass) -> None:
    program = flow.run(captured("residual"), *ORDER[:6])
    once = step(program)
    twice = step(once)
    assert show(twice.module) == show(once.module)
    assert twice.log[-1].rewrites == 0
    for kind in (QuantizedEdges, EdgeGroups):
        assert twice[kind] == once[kind]


def test_the_stages_write_their_facts_and_log_their_passes() -> None:
    program = scored("residual")
    for kind in (Settings, Sites, EdgeGroups, Ranges, WeightGrids, CostTables, SensitivityMatrix, Surrogates):
        assert kind in program
    assert FakeQuantNodes not in program
    assert [r.name.split("(")[0] for r in program.log].count("MeasureSensitivity") == 1
    assert show(program.module) == show(calibrated("residual").module)


def settled(**change: Any) -> Settings:
    return Settings(**{"bits": (4, 8), "target": "reference", **change})


def sites(**change: Any) -> tuple[list[str], dict[str, str]]:
    program = flow.find_sites(captured("residual"), settled(**change))
    return [site.name for site in program[Sites].sites], program[Sites].refusals


def test_sites_kept_in_float_say_so() -> None:
    names, refusals = sites(keep_float=("conv[12]",))
    assert names == ["conv3", "fc"]
    assert list(refusals.values()).count("kept in float as asked") == 2


@pytest.mark.parametrize("pins", [{"conv2": FLOAT}, {"conv*": FLOAT, "conv[13]": Choice(8, 8)}])
def test_a_pin_to_float_is_a_site_kept_in_float(pins: dict[str, Choice]) -> None:
    names, refusals = sites(pins=pins)
    assert names == ["conv1", "conv3", "fc"]
    assert "kept in float as asked" in refusals.values()


def test_pins_of_other_sites_survive_one_kept_in_float() -> None:
    program = flow.find_sites(captured("residual"), settled(pins={"conv1": FLOAT, "fc": Choice(8, 8)}))
    assert program[Sites].by_name("fc").choices == (Choice(8, 8),)
    assert len(program[Sites].by_name("conv2").choices) == 2


def test_patterns_that_match_nothing_and_nothing_left() -> None:
    with pytest.raises(OptionError, match="pattern 'convv' matches no site"):
        sites(keep_float=("convv",))
    with pytest.raises(OptionError, match=r"no layer can be quantized.*kept in float as asked"):
        sites(keep_float=("*",))
    with pytest.raises(OptionError, match="no layer can be quantized"):
        flow.find_sites(captured("weightless"), settled())


def test_plans_that_do_not_fit() -> None:
    program = calibrated("plain")
    plan = widest_plan(program)
    with pytest.raises(OptionError, match="the plan lacks sites conv2"):
        flow.impose(program, BitAllocation({k: v for k, v in plan.choices.items() if k != "conv2"}))
    with pytest.raises(OptionError, match="the budget allows"):
        flow.impose(program, plan, Budget(average_bits=4))


def test_a_budget_out_of_reach_fails_before_scoring() -> None:
    with pytest.raises(InfeasibleBudgetError, match="average_bits=1"):
        flow.check_budget(calibrated("plain"), Budget(average_bits=1))
    flow.check_budget(calibrated("plain"), Budget(average_bits=2, latency_ms=1e-9))


def ready(name: str, settings: Settings, images: CalibrationSet) -> Program:
    return flow.calibrate(flow.prepare(traced(name), settings), images)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("data", {"count": 5}),
        ("settings", {"bits": (4, 8)}),
        ("calibration", {"seen": 7}),
        ("model", {"name": "split"}),
    ],
)
def test_scores_of_something_else_are_refused_by_name(tmp_path: Path, field: str, change: dict[str, Any]) -> None:
    def score(name: str = "plain", bits: tuple[int, ...] = (2, 8), seen: int = 8, count: int = 6) -> None:
        program = ready(name, settled(bits=bits, estimators=("diagonal",)), CalibrationSet(inputs(name, seen)))
        flow.measure_sensitivity(program, CalibrationSet(inputs(name, count)), tmp_path)

    score()
    score()
    with pytest.raises(FileFormatError, match=f"were made with another [a-z, ]*{field}") as error:
        score(**change)
    # Other widths equalize channels otherwise, so that other values are seen.
    assert field in ("model", "settings") or f"another {field};" in str(error.value)


def test_models_that_differ_in_one_weight_differ(tmp_path: Path) -> None:
    model = built("tokens")
    settings = settled()
    for change in (0.0, 1e-3):
        with torch.no_grad():
            model.get_parameter("fc.bias")[0] += change
        program = flow.prepare(capture(model, inputs("tokens", 2)), settings)
        program = flow.calibrate(program, CalibrationSet(inputs("tokens", 4)))
        images = CalibrationSet(inputs("tokens", 4))
        if change:
            with pytest.raises(FileFormatError, match="model"):
                flow.measure_sensitivity(program, images, tmp_path)
        else:
            flow.measure_sensitivity(program, images, tmp_path)


def test_scores_may_be_taken_around_the_widest_integers() -> None:
    program = calibrated("plain")
    images = CalibrationSet(inputs("plain", 6))
    settings = replace(program[Settings], context="widest", estimators=("gram", "fisher"))
    found = flow.measure_sensitivity(program.with_facts(settings), images)[Surrogates].matrices
    images = judging_images(images, "kl", settings.seed)
    widest = widest_plan(program)
    module = simulate(program, widest, round_biases=False).module
    answer, reference = (model_outputs(each, images.inputs) for each in (module, program.module))
    loss = float(LOSSES["kl"](reference, answer, None).mean())
    for matrix in found.values():
        assert matrix.predict(widest.choices) == matrix.constant == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("target", ["onnxruntime", "fx_int8"])
@pytest.mark.parametrize("name", ["residual", "two_inputs", "separable", "attention"])
def test_every_mixture_of_float_and_integers_runs_on_every_target(target: str, name: str) -> None:
    images = CalibrationSet(MODELS[name].inputs(4))
    program = Program(capture(built(name), images.slice(0, 2).inputs).module)
    program = flow.calibrate(flow.prepare(program, Settings(bits=(8, 32), target=target)), images)
    widest = widest_plan(program).choices
    expected = model_outputs(program.module, images.inputs)
    names = list(widest)
    mixtures = [{}, *(dict.fromkeys(some, FLOAT) for some in (names[::2], names[1::2], *([k] for k in names)))]
    for floats in mixtures:
        module = simulate(program, BitAllocation({**widest, **floats})).module
        run = backend(target).compile(module, images.inputs)
        tolerance = 0.2 * float(expected.abs().max())
        torch.testing.assert_close(run(images.inputs), expected, atol=tolerance, rtol=0)
