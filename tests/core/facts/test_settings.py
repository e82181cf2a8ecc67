from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from fxquant.core.errors import OptionError
from fxquant.core.facts import EFFORTS, Settings, effort
from fxquant.passes.sensitivity import ESTIMATORS


def test_presets_name_estimators_that_exist_and_spend_more_with_more_effort() -> None:
    assert list(EFFORTS) == ["fast", "default", "best"]
    assert all(name in ESTIMATORS for preset in EFFORTS.values() for name in preset.estimators)
    images = [EFFORTS[name].images for name in EFFORTS]
    assert images == sorted(set(images))
    assert [EFFORTS[name].refine_moves for name in EFFORTS] == [0, 16, 48]
    assert set(effort("fast").estimators) < set(effort("default").estimators) < set(effort("best").estimators)


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(OptionError, match="unknown effort 'max'; known: fast, default, best"):
        effort("max")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": ()}, "at least one width"),
        ({"activation_bits": ()}, "at least one width"),
        ({"estimators": ()}, "name at least one"),
        ({"held_out": 0.0}, "between 0 and 1"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"time_limit": 0.0}, "above 0 seconds"),
        ({"time_limit": -1.0}, "above 0 seconds"),
        ({"requantization_cost": -0.1}, "at least 0"),
        ({"refine_moves": -1}, "at least 0"),
        ({"requantization_cost": float("nan")}, "at least 0"),
    ],
)
def test_values_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Settings(**change)


def test_settings_do_not_change() -> None:
    settings, field = Settings(), "seed"
    with pytest.raises(FrozenInstanceError):
        setattr(settings, field, 3)
