from __future__ import annotations

import numpy as np
import pytest
import torch

from fxquant.core.facts import BINS, Histogram, Ranges, WeightGrids
from fxquant.core.ir import Choice, EdgeGroups, FakeQuantize, Sites, WeightFormat, tensor_at
from fxquant.core.run import CalibrationSet
from fxquant.passes.sensitivity import ESTIMATORS, Column, RoundedWeight, mean_square, relative_error
from tests.scoring import inputs, scorer, simulated

weight_mse = ESTIMATORS["weight_mse"]
IMAGES = CalibrationSet(inputs("split", 6))
IMAGES_OF_PLAIN = CalibrationSet(inputs("plain", 6))


def test_relative_error_of_weights_and_activations_by_hand() -> None:
    program = simulated("split", (2, 4, 8), (4, 8))
    each = scorer(program, IMAGES)
    kinds = set()
    for column in each.columns:
        if column.site is not None and column.weight is not None:
            value = tensor_at(program.module, program[Sites].by_name(column.site).weight).detach()
            grid = program[WeightGrids].at(column.site, column.weight)
            rounded = FakeQuantize(grid)(value)
            expected = float((rounded - value).double().norm() / value.double().norm()) ** 2
        else:
            assert column.activation_bits is not None
            expected = 0.0
            for name in column.substitution:
                producer = each.replay.by_name[name].all_input_nodes[0].name
                group = next(g for g in program[EdgeGroups].producers.values() if producer in g)
                step = program[Ranges].grid(group, column.activation_bits).scale
                expected += float(step) ** 2 / 12 / mean_square(program[Ranges].histograms[producer])
        kinds.add(column.site is None)
        assert relative_error(each, column) == pytest.approx(expected, rel=1e-5)
    assert kinds == {True, False}


def test_weight_and_activation_of_one_choice_add_up() -> None:
    program = simulated("plain")
    joint, apart = scorer(program, IMAGES_OF_PLAIN), scorer(simulated("plain", (2, 4, 8), (4, 8)), IMAGES_OF_PLAIN)
    known = {(c.owner, c.weight_bits, c.activation_bits): relative_error(apart, c) for c in apart.columns}
    for column in joint.columns:
        tie = f"tie {program[Sites].by_name(column.owner).input_tie}"
        expected = known[column.owner, column.weight_bits, None] + known[tie, None, 8]
        assert relative_error(joint, column) == pytest.approx(expected)
    found = weight_mse(joint)
    assert found.predict({site.name: Choice(4, 8) for site in program[Sites].sites}) == pytest.approx(
        sum(relative_error(joint, c) for c in joint.columns if c.weight_bits == 4)
    )
    assert found.evaluations == 0


def test_no_image_is_looked_at() -> None:
    program = simulated("split")
    other = CalibrationSet((100 * torch.ones(3, 16),))
    assert np.array_equal(weight_mse(scorer(program, IMAGES)).values, weight_mse(scorer(program, other)).values)


def test_a_weight_used_at_two_places_is_rounded_once() -> None:
    each = scorer(simulated("split"), IMAGES)
    rounded = RoundedWeight(1.1 * tensor_at(each.program.module, "a.weight").detach())
    once, twice = (Column("a", dict.fromkeys(names, rounded), "a", WeightFormat(4), None) for names in ("q", "qr"))
    assert relative_error(each, once) == relative_error(each, twice) == pytest.approx(0.01, rel=1e-4)


def test_mean_square_of_a_histogram() -> None:
    counts = np.zeros(BINS)
    counts[[0, 3]] = 1.0, 3.0
    assert mean_square(Histogram(0.0, 1.0, counts, 0.0, 4.0)) == pytest.approx((0.5**2 + 3 * 3.5**2) / 4)
