"""Settings of the reconstruction engine: what is refused, and how the message helps."""

from __future__ import annotations

import math

import pytest

from fxquant.core.errors import OptionError
from fxquant.passes.rounding.learned import (
    ADAROUND,
    BRECQ,
    FAITHFUL,
    FAST,
    PDQUANT,
    QDROP,
    SECOND_STAGE,
    VIT,
    Reconstruction,
)

REFUSED: list[dict[str, object]] = [
    {"unit": "blocks"},
    {"learned": "nearest"},
    {"inputs": "both"},
    {"iterations": 0},
    {"batch": 0},
    {"prediction_every": 0},
    {"memory_mb": 0},
    {"mix": 1.5},
    {"drop": -0.1},
    {"warmup": 2.0},
    {"rounding_lr": -1.0},
    {"prediction": math.inf},
    {"regulariser": math.nan},
    {"correction": -1},
    {"temperature": 0.0},
    {"beta": (20.0,)},
    {"beta": (20.0, 0.0)},
]


WRONG: list[tuple[str, object]] = [("iterations", "many"), ("iterations", 2.5), ("drop", "half"), ("beta", 3)]


@pytest.mark.parametrize("values", REFUSED, ids=str)
def test_values_out_of_range_are_refused_by_name(values: dict[str, object]) -> None:
    (name,) = values
    with pytest.raises(OptionError, match=name):
        Reconstruction().changed(values)


def test_a_misspelt_setting_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(OptionError, match=r"unknown rounding option 'iteration' \(did you mean 'iterations'\?\)"):
        Reconstruction().changed({"iteration": 3})
    with pytest.raises(OptionError, match=r"unknown rounding option 'xyz'; known: unit, iterations"):
        Reconstruction().changed({"xyz": 3})


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_of_the_wrong_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(OptionError):
        Reconstruction().changed({name: value})


def test_a_number_of_blocks_may_be_a_number() -> None:
    assert Reconstruction().changed({"unit": 2}).unit == "2"


def test_changes_leave_the_rest_as_it_was() -> None:
    changed = PDQUANT.changed({"iterations": 7, "drop": 0})
    assert (changed.iterations, changed.drop, changed.correction) == (7, 0, PDQUANT.correction)
    assert PDQUANT.changed({}) == PDQUANT


def test_answers_are_wanted_for_either_term() -> None:
    asked = [options.wants_answers for options in (ADAROUND, BRECQ, QDROP, FAITHFUL, PDQUANT, FAST, SECOND_STAGE, VIT)]
    assert asked == [False] * 3 + [True] * 5
    assert Reconstruction(feature=1.0).wants_answers


def test_the_faithful_profile_is_the_published_one() -> None:
    told = (FAITHFUL.iterations, FAITHFUL.batch, FAITHFUL.rounding_lr, FAITHFUL.step_lr, FAITHFUL.step_share)
    assert told == (20000, 32, 3e-3, 4e-5, False)
    assert (FAITHFUL.regulariser, FAITHFUL.warmup, FAITHFUL.beta) == (0.01, 0.2, (20.0, 2.0))
    assert (FAITHFUL.prediction, FAITHFUL.temperature, FAITHFUL.correction_weight) == (10.0, 4.0, 50.0)
    assert (FAITHFUL.inputs, FAITHFUL.mix, FAITHFUL.drop, FAITHFUL.correction) == ("mixed", 0.5, 0.5, 500)
    assert FAITHFUL.asymmetric
    assert not FAITHFUL.normalise
