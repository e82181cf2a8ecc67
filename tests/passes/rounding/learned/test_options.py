"""Settings of the reconstruction engine: what is refused, and how the message helps."""

from __future__ import annotations

import math

import pytest

from fxquant.core.errors import OptionError
from fxquant.passes.rounding.learned import PROFILES, Reconstruction

REFUSED: list[tuple[str, object]] = [
    *(
        ("unit", "blocks"),
        ("learned", "nearest"),
        ("inputs", "both"),
        ("iterations", 0),
        ("batch", 0),
        ("memory_mb", 0),
    ),
    *(("prediction_every", 0), ("drop", -0.1), ("warmup", 2.0), ("rounding_lr", -1.0), ("prediction", math.inf)),
    *(("memory_mb", 0), ("regulariser", math.nan), ("correction", -1), ("temperature", 0.0)),
    *(("iterations", "many"), ("iterations", 2.5), ("drop", "half")),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_values_out_of_range_or_of_another_type_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=name):
        Reconstruction().changed({name: value})


def test_a_misspelt_setting_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(OptionError, match=r"unknown rounding option 'iteration' \(did you mean 'iterations'\?\)"):
        Reconstruction().changed({"iteration": 3})
    with pytest.raises(OptionError, match=r"unknown rounding option 'xyz'; known: unit, iterations"):
        Reconstruction().changed({"xyz": 3})


def test_a_number_of_blocks_may_be_a_number() -> None:
    assert Reconstruction().changed({"unit": 2}).unit == "2"


def test_changes_leave_the_rest_as_it_was() -> None:
    known = PROFILES["pdquant"].stages["pdquant"]
    changed = known.changed({"iterations": 7, "drop": 0})
    assert (changed.iterations, changed.drop, changed.correction) == (7, 0, known.correction)
    assert known.changed({}) == known


def test_answers_are_wanted_for_either_term() -> None:
    assert not Reconstruction().wants_answers
    assert Reconstruction(prediction=1.0).wants_answers
    assert Reconstruction(feature=1.0).wants_answers
