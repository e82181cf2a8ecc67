from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.core.errors import OptionError
from fxquant.core.facts import Budget

QUALITIES = ("loss", "disagreement", "accuracy_drop")
NAMES = (
    "size_mb",
    "size_ratio",
    "file_mb",
    "file_ratio",
    "average_bits",
    "bops",
    "bops_ratio",
    "activation_mb",
    "latency_ms",
    "latency_ratio",
)


@given(st.dictionaries(st.sampled_from(NAMES), st.floats(1e-6, 1e12), min_size=1))
@settings(max_examples=40, deadline=None)
def test_a_budget_is_read_in_every_form(limits: dict[str, float]) -> None:
    budget = Budget.of(limits)
    texts = [f"{name}={value!r}" for name, value in limits.items()]
    assert budget == Budget.of(texts) == Budget.of(iter(texts)) == Budget.of(" , ".join(texts)) == Budget.of(budget)
    assert budget.limits == limits
    assert budget.needs_latency == any(name.startswith("latency") for name in limits)
    assert all(name in str(budget) for name in limits)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "4"])
def test_limits_are_finite_and_positive(value: float) -> None:
    with pytest.raises(OptionError, match=r"average_bits=.* must be a finite number"):
        Budget(average_bits=value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least one limit; give one or more of size_mb, size_ratio"),
        (["size_mb"], "write name=number"),
        ("", "write name=number"),
        (["sizemb=1"], r"unknown budget 'sizemb' \(did you mean 'size_mb'\?\); known: size_mb"),
        ({"bits": 4}, "unknown budget 'bits'"),
        ({"average_bits": "4"}, "must be a finite number"),
        (4, "budget 4 is not understood; give a Budget, a mapping or a text like 'size_mb=0.2'"),
        ([4], r"budget \[4\] is not understood"),
        (["size_mb=big"], "'big' is not a number"),
        (["size_mb="], "'' is not a number"),
        (["size_mb=1", "size_mb=2"], "given twice"),
        (["size_mb=nan"], "finite"),
        (["=1"], "unknown budget ''"),
        (["loss=1", "minimize=average_bits", "minimize=size_ratio"], "budget minimize is given twice"),
    ],
)
def test_budgets_not_understood(texts: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Budget.of(texts)


def test_limits_on_answers_are_separate_from_limits_on_costs() -> None:
    budget = Budget.of(["accuracy_drop=0.01", "size_mb=2", "minimize=latency_ratio"])
    assert (budget.limits, budget.quality) == ({"size_mb": 2.0}, {"accuracy_drop": 0.01})
    assert budget.needs_latency
    assert str(budget) == "size_mb=2, accuracy_drop=0.01, minimize=latency_ratio"
    assert not Budget(disagreement=0).needs_latency
    assert Budget.of(budget.limits) == Budget(size_mb=2)


@pytest.mark.parametrize("name", QUALITIES[1:])
@pytest.mark.parametrize("value", [-0.01, 1.5, 5])
def test_shares_of_images_lie_between_none_and_all(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"budget {name}={value} is a share of images and must lie in 0..1"):
        Budget.of({name: value})


def test_only_known_costs_are_made_small() -> None:
    with pytest.raises(OptionError, match="minimize='size' is unknown; known: size_ratio, file_ratio, average_bits"):
        Budget(loss=0.1, minimize="size")
