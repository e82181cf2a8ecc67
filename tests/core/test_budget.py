from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.core.budget import Budget
from fxquant.core.errors import OptionError

NAMES = ("size_mb", "size_ratio", "average_bits", "bops", "bops_ratio", "activation_mb", "latency_ms", "latency_ratio")


@given(st.dictionaries(st.sampled_from(NAMES), st.floats(1e-6, 1e12), min_size=1))
@settings(max_examples=40, deadline=None)
def test_parse_reads_what_was_written(limits: dict[str, float]) -> None:
    budget = Budget.parse(f"{name}={value!r}" for name, value in limits.items())
    assert budget.limits == limits
    assert budget.needs_latency == any(name.startswith("latency") for name in limits)
    assert all(name in str(budget) for name in limits)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "4"])
def test_limits_are_finite_and_positive(value: float) -> None:
    with pytest.raises(OptionError, match=r"average_bits=.* must be a finite number above 0"):
        Budget(average_bits=value)


def test_a_budget_limits_something() -> None:
    with pytest.raises(OptionError, match="at least one limit; give one or more of size_mb, size_ratio"):
        Budget()
    with pytest.raises(OptionError, match="at least one limit"):
        Budget.parse([])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["size_mb"], "write name=number"),
        (["sizemb=1"], "write name=number with one of size_mb"),
        (["size_mb=big"], "'big' is not a number"),
        (["size_mb="], "'' is not a number"),
        (["size_mb=1", "size_mb=2"], "given twice"),
        (["size_mb=nan"], "finite"),
        (["=1"], "not understood"),
    ],
)
def test_texts_not_understood(texts: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Budget.parse(texts)


def test_several_limits_hold_together() -> None:
    budget = Budget(size_mb=1, bops_ratio=0.5)
    assert budget.limits == {"size_mb": 1.0, "bops_ratio": 0.5}
    assert not budget.needs_latency
    assert str(budget) == "size_mb=1, bops_ratio=0.5"
