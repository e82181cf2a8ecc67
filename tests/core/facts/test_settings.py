from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from fxquant.core.errors import OptionError
from fxquant.core.facts import EFFORTS, Settings
from fxquant.core.ir import Choice
from fxquant.passes.sensitivity import ESTIMATORS


def test_presets_name_estimators_that_exist_and_spend_more_with_more_effort() -> None:
    presets = list(EFFORTS.values())
    assert {name for preset in presets for name in preset.estimators} <= set(ESTIMATORS)
    for less, more in itertools.pairwise(presets):
        assert (less.images, less.refine_moves, less.rounds) < (more.images, more.refine_moves, more.rounds)
        assert set(less.estimators) < set(more.estimators)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": ()}, "bits is empty"),
        ({"activation_bits": ()}, "activation_bits is empty"),
        ({"estimators": ()}, "estimators is empty"),
        ({"held_out": 0.0}, "held_out=0.0 must be a finite number above 0 and below 1"),
        ({"held_out": 1.0}, "below 1"),
        ({"time_limit": 0.0}, "time_limit=0.0 must be a finite number above 0"),
        ({"requantization_cost": -0.1}, "must be a finite number of at least 0"),
        ({"requantization_cost": float("nan")}, "must be a finite number of at least 0"),
        ({"refine_moves": -1}, "must be a whole number of at least 0"),
        ({"rounds": 1.5}, "must be a whole number"),
        ({"context": "nearest"}, "unknown context 'nearest'; known: float, widest"),
        ({"effort": "max"}, "unknown effort 'max'; known: fast, default, best"),
        ({"threads": 0}, "must be a whole number of at least 1"),
    ],
)
def test_values_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Settings(**change)


def test_values_are_brought_to_their_type() -> None:
    settings = Settings.of({"bits": [8, 2, 8], "target": Path("npu.json"), "forbid": {"fc": "W2A8"}})
    assert (settings.bits, settings.target, settings.forbid) == ((2, 8), "npu.json", {"fc": (Choice(2, 8),)})


def test_the_effort_fills_in_what_is_not_given() -> None:
    settled = Settings(effort="best", rounds=7).settled(rounding="nearest")
    best = EFFORTS["best"]
    assert (settled.estimators, settled.refine_moves) == (best.estimators, best.refine_moves)
    assert (settled.rounds, settled.rounding) == (7, "nearest")


def test_settings_that_an_earlier_result_holds_are_read() -> None:
    searched = {"bits": [4, 8], "pins": {"fc": "W8A8"}, "forbid": {"conv": ["W2A8", "float"]}, "keep_float": ["head"]}
    measured = {
        "estimators": ["gram"],
        "refine_moves": 16,
        "rounds": 1,
        "rounding": "qronos_rescaled",
        "curve": 9,
        "loss": None,
    }
    saved = searched | measured
    read = Settings.of(saved)
    assert read.forbid == {"conv": (Choice(2, 8), Choice(32, 32))}
    assert read.settled() == read
    assert saved.items() <= read.to_json().items()
