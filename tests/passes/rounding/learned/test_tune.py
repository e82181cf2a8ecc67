"""The loop: its error terms against a plain rewriting of the published formulas, its schedules, and when it stops."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.core.facts import FakeQuantNodes
from fxquant.core.ir import Sites
from fxquant.core.run import LOSSES, Span, cut_span
from fxquant.passes import simulate
from fxquant.passes.rounding.learned import (
    PROFILES,
    LearnedActivation,
    Material,
    Outcome,
    Pieces,
    Reconstruction,
    SoftRounding,
    Tuner,
    UnitQuantizers,
    channel_sums,
    find_units,
    tune,
)
from tests import scoring
from tests.passes.rounding.tasks import plan_of

IMAGES = 12
PLAIN = replace(PROFILES["pdquant-faithful"].stages["pdquant-faithful"], iterations=10, batch=4, drop=0.0, correction=0)


@pytest.fixture(autouse=True)
def quantized_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mix nothing in unless a test asks for it: what is drawn at random cannot be written down by hand."""
    monkeypatch.setattr(tune, "MIX", 1.0)


def tuner(options: Reconstruction, index: int = 1, feature: str | None = None) -> Tuner:
    """Return the loop of one unit of the plain net, its float inputs moved so that they differ from the quantized."""
    planned = scoring.calibrated("plain")
    program = simulate(planned, plan_of(planned, 2), round_biases=False)
    module, sites = program.module, program[Sites].sites
    units, (x,) = find_units(module, sites), scoring.inputs("plain", IMAGES)
    floats, quantized = {"x": x}, {"x": x}
    for unit in units[:index]:
        floats |= cut_span(module, unit.nodes, unit.outputs, quantized=False)(floats)
        quantized |= cut_span(module, unit.nodes, unit.outputs, quantized=True)(quantized)
    unit, behind = units[index], [node for later in units[index + 1 :] for node in later.nodes]
    answer = module.graph.output_node().all_input_nodes[0].name
    outputs = [name for name in (answer, feature) if name is not None]
    suffix = cut_span(module, behind, outputs, quantized=False) if behind else None
    found = UnitQuantizers(module, program[FakeQuantNodes], sites)
    learned = found.learned(unit, Outcome(), options, torch.Generator().manual_seed(0))
    nearest = found.in_place({}, found.as_calibrated(unit, Outcome()))
    with torch.no_grad():
        targets = cut_span(module, unit.nodes, unit.outputs, quantized=False)(floats)
        everything = [node for each in units for node in each.nodes]
        answers = cut_span(module, everything, outputs, quantized=False)({"x": x})

    def spans(places: dict[str, nn.Module]) -> Span:
        return cut_span(module, unit.nodes, unit.outputs, quantized=True, replacements=places)

    pieces = Pieces(
        spans(found.in_place(learned, Outcome())),
        spans(nearest),
        suffix,
        answer,
        feature,
        partial(LOSSES["kl"].soften, temperature=4.0),
        learned,
    )
    material = Material(
        IMAGES,
        lambda index: {name: value[index].detach() for name, value in quantized.items()},
        lambda index: {name: floats[name][index].detach() for name in unit.inputs},
        lambda index: {name: value[index] for name, value in targets.items()},
        lambda index: {name: value[index] for name, value in answers.items()},
    )
    return Tuner(pieces, material, options, 0, torch.Generator().manual_seed(1))


def squares(outputs: Tensor, targets: Tensor) -> float:
    """`mean_{n,h,w} sum_c (y - Y)^2`, image by image and place by place."""
    total = 0.0
    for y, target in zip(outputs.flatten(2), targets.flatten(2), strict=True):
        for place in range(y.shape[1]):
            total += sum(float(a - b) ** 2 for a, b in zip(y[:, place], target[:, place], strict=True))
    return total / (outputs.shape[0] * outputs.flatten(2).shape[2])


def kl(reference: Tensor, answer: Tensor, temperature: float) -> float:
    """Batch mean of the softened divergence, without a factor T^2."""
    total = 0.0
    for p, z in zip(reference, answer, strict=True):
        shares = [[math.exp(float(each) / temperature) for each in row] for row in (p, z)]
        one, other = ([each / sum(row) for each in row] for row in shares)
        total += sum(a * math.log(a / b) for a, b in zip(one, other, strict=True))
    return total / len(reference)


def test_error_terms_are_the_published_ones() -> None:
    made, index = tuner(PLAIN), torch.tensor([5, 0, 5, 11])
    errors = {name: float(error.detach()) for name, error in made.errors(index, 0).items()}
    outputs = made.pieces.unit(made.material.quantized(index))
    targets = made.material.targets(index)
    (name,) = targets
    assert errors["rec"] == pytest.approx(squares(outputs[name].detach(), targets[name]), rel=1e-5)
    assert made.pieces.suffix is not None
    answer = made.pieces.suffix({**made.material.quantized(index), **outputs})[made.pieces.answer].detach()
    reference = made.material.answers(index)[made.pieces.answer]
    # In float32 the logarithms of close answers cancel.
    assert errors["prediction"] == pytest.approx(kl(reference, answer, 4.0), rel=1e-5, abs=1e-7)
    assert errors["rec"] > 0
    assert errors["prediction"] > 1e-5


def test_the_loss_is_their_published_sum() -> None:
    made = tuner(replace(PLAIN, iterations=1, warmup=0.0))
    first = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))[:4]
    errors = made.errors(first, 0)
    soft = [module for module in made.pieces.learned.values() if isinstance(module, SoftRounding)]
    assert soft
    trace = made.run()
    assert trace.losses[0] == pytest.approx(float((errors["rec"] + 10.0 * errors["prediction"]).detach()), rel=1e-5)


def test_float_inputs_are_read_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.arange(4)
    monkeypatch.setattr(tune, "MIX", 0.0)
    for asked in ("float", "mixed"):
        made = tuner(replace(PLAIN, inputs=asked))
        outputs, targets = made.pieces.unit(made.material.floats(index)), made.material.targets(index)
        expected = sum(channel_sums(outputs[name] - targets[name]) for name in targets)
        assert float(made.errors(index, 0)["rec"].detach()) == pytest.approx(
            float(torch.as_tensor(expected).detach()), rel=1e-5
        )
        # The prediction always comes from the quantized network.
        other = tuner(replace(PLAIN, inputs="quantized")).errors(index, 0)
        assert torch.allclose(made.errors(index, 0)["prediction"], other["prediction"], rtol=1e-4)
        assert not torch.allclose(made.errors(index, 0)["rec"], other["rec"], rtol=1e-4)


def test_the_prediction_comes_at_every_kth_step_and_k_times_as_heavy() -> None:
    rare, index = tuner(replace(PLAIN, prediction_every=3)), torch.arange(4)
    turns = [rare.errors(index, iteration) for iteration in range(5)]
    assert ["prediction" in errors for errors in turns] == [True, False, False, True, False]
    always = tuner(PLAIN).errors(index, 0)["prediction"]
    assert torch.allclose(turns[3]["prediction"], 3 * always, rtol=1e-5)


def test_normalised_errors_are_one_at_nearest_rounding() -> None:
    options = replace(PLAIN, normalise=True, batch=IMAGES, prediction_every=3, inputs="quantized")
    made, index = tuner(options), torch.arange(IMAGES)
    nearest = replace(made.pieces, unit=made.pieces.nearest)
    at_nearest = Tuner(nearest, made.material, options, 0, torch.Generator()).errors(index, 0)
    # A prediction term that comes thrice as heavy comes at a third of the steps.
    for name, times in (("rec", 1), ("prediction", 3)):
        assert float(at_nearest[name].detach()) / made._norms[name] == pytest.approx(times, rel=1e-3)


def test_the_unit_with_the_answer_may_be_tuned_by_the_prediction_alone() -> None:
    made = tuner(replace(PLAIN, answer_by_prediction=True, prediction_every=4), index=2)
    assert made.pieces.holds_answer
    for iteration in range(3):
        assert list(made.errors(torch.arange(4), iteration)) == ["prediction"]
    unweighted = tuner(replace(PLAIN, answer_by_prediction=True, prediction=0.0), index=2)
    assert list(unweighted.errors(torch.arange(4), 0)) == ["prediction"]
    assert float(unweighted.total({"prediction": torch.tensor(3.0)})) == 3.0
    every_time = tuner(replace(PLAIN, answer_by_prediction=True), index=2).errors(torch.arange(4), 0)
    assert torch.allclose(made.errors(torch.arange(4), 0)["prediction"], every_time["prediction"])
    assert len(made.run().losses) == 10
    assert list(tuner(replace(PLAIN, answer_by_prediction=True), index=1).errors(torch.arange(4), 0)) == [
        "rec",
        "prediction",
    ]


def test_the_feature_error_is_taken_in_front_of_the_last_layer() -> None:
    made, index = tuner(replace(PLAIN, feature=1.0), feature="mean"), torch.arange(4)
    assert made.pieces.suffix is not None
    values = made.pieces.suffix({**made.material.quantized(index), **made.pieces.unit(made.material.quantized(index))})
    expected = squares(values["mean"].detach().unsqueeze(2), made.material.answers(index)["mean"].unsqueeze(2))
    assert float(made.errors(index, 0)["feature"].detach()) == pytest.approx(expected, rel=1e-4)


def test_the_penalty_waits_for_the_warm_up_and_its_exponent_falls_linearly() -> None:
    made = tuner(replace(PLAIN, iterations=100, warmup=0.2, regulariser=0.5))
    soft = [module for module in made.pieces.learned.values() if isinstance(module, SoftRounding)]
    assert [made._penalty(iteration) for iteration in (0, 19)] == [None, None]
    for iteration, beta in ((20, 20.0), (60, 11.0), (100, 2.0)):
        found = made._penalty(iteration)
        assert found is not None
        expected = 0.5 * sum(float(module.penalty(beta).detach()) for module in soft)
        assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_step_rates_fall_as_a_cosine_and_rounding_rates_stay() -> None:
    made = tuner(replace(PLAIN, iterations=8), index=0)
    optimizer, schedule = made._optimizers()
    start = [group["lr"] for group in optimizer.param_groups]
    seen = []
    for _ in range(9):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    for column, first in enumerate(start):
        falls = made._optimizers()[0].param_groups[column]["falls"]
        for k, rates in enumerate(seen):
            share = 0.5 * (1 + math.cos(math.pi * k / 8)) if falls else 1.0
            assert rates[column] == pytest.approx(first * share, abs=1e-12)
    assert {group["falls"] for group in optimizer.param_groups} == {True, False}


def test_a_published_rate_is_absolute_and_a_share_is_not() -> None:
    def moved(options: Reconstruction) -> list[float]:
        made = tuner(options, index=0)
        groups = [group for group in made._optimizers()[0].param_groups if group["falls"]]
        starts = [float(m.start) for m in made.pieces.learned.values() if isinstance(m, LearnedActivation)]
        return [group["lr"] * start for group, start in zip(groups, starts, strict=True)]

    assert moved(PLAIN) == pytest.approx([4e-5] * len(moved(PLAIN)))
    assert len(set(moved(replace(PLAIN, step_share=True, step_lr=1e-3)))) > 1


def test_every_image_is_drawn_once_before_any_is_drawn_again() -> None:
    made = tuner(replace(PLAIN, batch=5))
    drawn = torch.cat([made._draw() for _ in range(12)])
    for epoch in drawn.reshape(-1, IMAGES):
        assert epoch.sort().values.tolist() == list(range(IMAGES))
    assert not torch.equal(drawn[:IMAGES], drawn[IMAGES : 2 * IMAGES])
    assert torch.equal(torch.cat([tuner(replace(PLAIN, batch=5))._draw() for _ in range(1)]), drawn[:5])


def test_divergence_stops_the_loop() -> None:
    options = replace(PLAIN, learned="straight_through", step_lr=1e4, weight_lr=1e4, iterations=30, normalise=True)
    trace = tuner(options).run()
    assert trace.diverged
    assert len(trace.losses) < 30


def test_channel_sums_count_channels_on_their_axis() -> None:
    for shape, channels in (((2, 3, 4, 5), 3), ((2, 3), 3), ((2, 7, 3), 3), ((6,), 1)):
        error = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert float(channel_sums(error)) == pytest.approx(float(error.square().mean()) * channels, rel=1e-5)


def test_divergences_are_zero_at_the_reference_alone() -> None:
    reference = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    soften = LOSSES["kl"].soften
    for divergence, temperature in ((soften, 1.0), (soften, 4.0), (LOSSES["mse"].soften, 1.0)):
        assert float(divergence(reference, reference, temperature)) == 0.0
        assert float(divergence(reference, reference * 2, temperature)) > 0
    expected = F.kl_div(
        torch.log_softmax(reference / 2, 1), torch.log_softmax(reference, 1), None, None, "batchmean", True
    )
    assert torch.allclose(soften(reference, reference / 2, 1.0), expected, rtol=1e-4)
    assert float(LOSSES["mse"].soften(reference, 2 * reference, 1.0)) == pytest.approx(1.0)
