from __future__ import annotations

from typing import Any

import pytest

from fxquant.core.errors import OptionError
from fxquant.core.settings import EFFORTS, Settings, effort


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": ()}, "need at least one width each"),
        ({"activation_bits": ()}, "need at least one width each"),
        ({"estimators": ()}, "estimators is empty"),
        ({"held_out": 0.0}, "held_out=0.0 must lie between 0 and 1"),
        ({"held_out": 1.0}, "must lie between 0 and 1"),
        ({"time_limit": 0.0}, "must be above 0 seconds"),
    ],
)
def test_values_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Settings(**change)


def test_efforts_rise() -> None:
    images = [effort(name).images for name in ("fast", "default", "best")]
    assert images == sorted(images)
    assert list(EFFORTS) == ["fast", "default", "best"]
    with pytest.raises(OptionError, match="unknown effort 'high'; known: fast, default, best"):
        effort("high")
