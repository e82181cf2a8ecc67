"""Outcomes of units: merged, stored as arrays, put in place of quantizers."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.core.facts import FakeQuantNodes
from fxquant.core.ir import FakeQuantize, Program, Sites
from fxquant.passes.rounding.learned import (
    Chosen,
    DecidedBias,
    DecidedWeight,
    LearnedActivation,
    Outcome,
    Reconstruction,
    SoftRounding,
    StraightThrough,
    Unit,
    UnitQuantizers,
    find_units,
)
from tests.passes.rounding.tasks import task_of

OPTIONS = Reconstruction()
STRAIGHT = Reconstruction(learned="straight_through")


def simulated(name: str) -> Program:
    return task_of(name, 4).bare()


def found(name: str, earlier: Chosen | None = None) -> tuple[UnitQuantizers, tuple[Unit, ...]]:
    program = simulated(name)
    sites = program[Sites].sites
    return UnitQuantizers(program.module, program[FakeQuantNodes], sites, earlier), find_units(program.module, sites)


def outcome() -> Outcome:
    return Outcome({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([0.5])}, {"values of g": torch.tensor(0.25)})


def test_arrays_give_it_back_and_others_are_ignored() -> None:
    arrays = {**outcome().arrays(), "record": torch.zeros(3).numpy(), "weight": torch.zeros(1).numpy()}
    read = Outcome.from_arrays(arrays, torch.device("cpu"))
    assert [list(held) for held in (read.weights, read.scales, read.steps)] == [["a"], ["a"], ["values of g"]]
    assert torch.equal(read.weights["a"], outcome().weights["a"])
    assert read.steps["values of g"].shape == ()
    assert float(read.steps["values of g"]) == 0.25


def test_the_other_outcome_wins() -> None:
    joined = outcome().joined(Outcome({"a": torch.zeros(1), "b": torch.ones(1)}))
    assert torch.equal(joined.weights["a"], torch.zeros(1))
    assert joined.weights.keys() == {"a", "b"}
    assert joined.steps == outcome().steps


@pytest.mark.parametrize(
    ("kind", "value"), [("weights", math.nan), ("scales", 0.0), ("steps", -1.0), ("steps", math.inf)]
)
def test_numbers_that_no_graph_can_use_are_not_finite(kind: str, value: float) -> None:
    assert outcome().finite
    held = {"weights": outcome().weights, "scales": outcome().scales, "steps": outcome().steps}
    held[kind] = {"a": torch.tensor(value)}
    assert not Outcome(**held).finite


def test_what_earlier_units_decided_is_not_learned_again() -> None:
    quantizers, units = found("shared")
    generator, decided = torch.Generator(), Outcome()
    for unit in units:
        learned = quantizers.learned(unit, decided, OPTIONS, generator)
        fresh = quantizers.decided(unit, learned)
        assert not fresh.weights.keys() & decided.weights.keys()
        assert not fresh.steps.keys() & decided.steps.keys()
        decided = decided.joined(fresh)
    assert decided.weights.keys() == {"conv", "fc_b"}
    assert len(decided.steps) == len(
        [names for names in simulated("shared")[FakeQuantNodes].activations.values() if names]
    )


def test_kinds_of_learned_weights() -> None:
    quantizers, units = found("residual")
    for options, kind in ((OPTIONS, SoftRounding), (STRAIGHT, StraightThrough)):
        learned = quantizers.learned(units[0], Outcome(), options, torch.Generator())
        assert isinstance(learned["conv1"], kind)
        activations = [module for module in learned.values() if isinstance(module, LearnedActivation)]
        assert len(activations) == len(learned) - 1 > 0
        scales = quantizers.decided(units[0], learned).scales
        assert (list(scales) == ["conv1"]) == (kind is StraightThrough)


def test_a_step_that_is_not_learned_stays_as_calibrated() -> None:
    quantizers, units = found("residual")
    calibrated = quantizers.as_calibrated(units[0], Outcome())
    fixed = quantizers.learned(units[0], Outcome(), Reconstruction(step_lr=0.0), torch.Generator())
    steps = quantizers.decided(units[0], fixed).steps
    assert steps.keys() == calibrated.steps.keys()
    assert all(torch.equal(steps[group], calibrated.steps[group]) for group in steps)


def test_places_hold_what_is_learned_then_what_is_decided() -> None:
    quantizers, units = found("residual")
    decided = quantizers.as_calibrated(units[0], Outcome())
    learned = quantizers.learned(units[1], decided, OPTIONS, torch.Generator())
    places = quantizers.in_place(learned, decided)
    names = simulated("residual")[FakeQuantNodes]
    assert isinstance(places[names.weights["conv1"][0]], DecidedWeight)
    assert isinstance(places[names.weights["conv2"][0]], SoftRounding)
    assert names.weights["conv3"][0] not in places
    for group, step in decided.steps.items():
        for name in names.activations[group]:
            quantizer = places[name]
            assert isinstance(quantizer, FakeQuantize)
            assert torch.equal(quantizer.scale, step)


def test_an_earlier_algorithms_weights_take_the_place_of_nearest_ones() -> None:
    plain, units = found("residual")
    nearest = plain.as_calibrated(units[0], Outcome()).weights["conv1"]
    scale = torch.where(nearest >= 0, -0.5, 0.5) * nearest.abs().amax()
    moved = found("residual", Chosen({"conv1": scale}))[0]
    on_grid = moved.as_calibrated(units[0], Outcome()).weights["conv1"]
    assert not torch.equal(on_grid, nearest)
    straight = moved.learned(units[0], Outcome(), STRAIGHT, torch.Generator())["conv1"]
    assert isinstance(straight, StraightThrough)
    assert torch.equal(straight.base, scale)
    # Directions begin next to the level that was chosen, half way from where the float weight is.
    soft = moved.learned(units[0], Outcome(), OPTIONS, torch.Generator())["conv1"]
    assert isinstance(soft, SoftRounding)
    step = soft.steps().reshape(-1, 1, 1, 1)
    assert float(((soft.hard() - on_grid) / step).abs().max()) <= 1 + 1e-4


def test_an_earlier_algorithms_biases_stay_with_its_own_weights() -> None:
    plain, units = found("residual")
    assert not plain.as_calibrated(units[0], Outcome()).biases
    bias = torch.arange(8.0)
    op = simulated("residual")[Sites].sites[0].nodes[0]
    moved = found("residual", Chosen(biases={op: bias}))[0]
    assert torch.equal(moved.as_calibrated(units[0], Outcome()).biases[op], bias)
    learned = moved.learned(units[0], Outcome(), OPTIONS, torch.Generator())
    # With weights that are learned the bias is the model's own again.
    assert op not in moved.in_place(learned, Outcome())
    assert not moved.decided(units[0], learned).biases
    place = moved.in_place({}, moved.as_calibrated(units[0], Outcome()))[op]
    assert isinstance(place, DecidedBias)
    assert torch.equal(place(), bias)
