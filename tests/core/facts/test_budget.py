from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.core.errors import OptionError
from fxquant.core.facts import Budget

QUALITIES = ("loss", "disagreement", "accuracy_drop")
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
    with pytest.raises(OptionError, match=r"average_bits=.* must be a finite number"):
        Budget(average_bits=value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least one limit; give one or more of size_mb, size_ratio"),
        (["size_mb"], "write name=number"),
        (["sizemb=1"], "write name=number with one of size_mb"),
        (["size_mb=big"], "'big' is not a number"),
        (["size_mb="], "'' is not a number"),
        (["size_mb=1", "size_mb=2"], "given twice"),
        (["size_mb=nan"], "finite"),
        (["=1"], "not understood"),
        (["loss=1", "minimize=average_bits", "minimize=size_ratio"], "budget minimize is given twice"),
    ],
)
def test_texts_not_understood(texts: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Budget.parse(texts)


def test_limits_on_answers_are_separate_from_limits_on_costs() -> None:
    budget = Budget.parse(["accuracy_drop=0.01", "size_mb=2", "minimize=latency_ratio"])
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
    with pytest.raises(OptionError, match="minimize='size' is unknown; known: size_ratio, average_bits"):
        Budget(loss=0.1, minimize="size")
