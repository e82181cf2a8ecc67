from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from fxquant.core.facts import (
    Budget,
    CostTable,
    CostTables,
    agrees,
    fits,
    infeasible_message,
    limit_products,
    limit_rows,
    reachable,
    tie_rows,
    usage,
)
from fxquant.core.ir import FLOAT, Choice, Site, Sites

A4, A8 = Choice(8, 4), Choice(8, 8)


def site(name: str, tie: str, *choices: Choice) -> Site:
    return Site(name, "conv", f"{name}.weight", (name,), 1, 1, 0, 1, tie, choices)


SITES = Sites((site("left", "x", A4, A8), site("right", "x", A4, A8), site("last", "y", A4, A8, FLOAT)), {})
SIZE = CostTable(SITES.candidates, np.arange(1.0, 8.0) * 1e6, 1e6, 40e6, "bytes")
PEAK = CostTable(
    SITES.candidates,
    np.array([[1.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 8.0], [0.0] * 7]) * 1e6,
    0.5e6,
    20e6,
    "bytes",
    np.array([1.0, 0.0, 0.25]) * 1e6,
)
TABLES = CostTables({"size": SIZE, "activation": PEAK})
PLANS = [
    dict(zip(("left", "right", "last"), row, strict=True)) for row in product(*(each.choices for each in SITES.sites))
]


def test_usage_is_in_the_units_of_the_limits() -> None:
    plan = {"left": A8, "right": A4, "last": FLOAT}
    used = usage(plan, {"size_mb": 1, "size_ratio": 1, "activation_mb": 1}, TABLES)
    assert used == pytest.approx({"size_mb": 13.0, "size_ratio": 13 / 40, "activation_mb": 8.5})
    assert fits(plan, used, TABLES)
    assert not fits(plan, {**used, "activation_mb": 8.4}, TABLES)


@pytest.mark.parametrize("limits", [{"activation_mb": m} for m in (1.0, 3.5, 4.6, 5.5, 8.5)] + [{"size_mb": 11.0}])
def test_rows_keep_what_fits(limits: dict[str, float]) -> None:
    costs, bounds = limit_rows(limits, TABLES, SITES)
    for plan in PLANS:
        picked = np.array([plan[c.site] == c.choice for c in SITES.candidates])
        assert bool((costs[:, picked].sum(axis=1) <= bounds + 1e-9).all()) == fits(plan, limits, TABLES)
    assert set(np.abs(bounds)) <= {1.0}


def test_a_row_that_nothing_breaks_is_left_out() -> None:
    assert limit_rows({"activation_mb": 6.0}, TABLES, SITES)[0].shape == (1, 7)
    assert limit_rows({"activation_mb": 9.0}, TABLES, SITES)[0].shape == (0, 7)
    assert limit_rows({"size_mb": 99.0}, TABLES, SITES)[0].shape == (1, 7)


def test_the_reachable_range_of_a_peak() -> None:
    costs = [PEAK.of(plan) for plan in PLANS]
    assert reachable(PEAK, SITES) == (min(costs), max(costs)) == (3.5e6, 8.5e6)
    message = infeasible_message(Budget(activation_mb=2), SITES, TABLES)
    assert "activation_mb=2 (reachable: 3.5 to 8.5)" in message


def test_ties() -> None:
    costs, bounds = tie_rows(SITES)
    for plan in PLANS:
        picked = np.array([plan[c.site] == c.choice for c in SITES.candidates])
        assert bool((costs[:, picked].sum(axis=1) <= bounds).all()) == agrees(SITES.sites, plan)
    assert not agrees(SITES.sites, {"left": A8, "right": A4, "last": A8})


def test_products_go_with_the_row_of_their_limit() -> None:
    products = np.zeros((7, 7))
    products[1, 6] = products[6, 1] = 2.0
    latency = CostTable(SITES.candidates, np.ones(7), 1.0, 10.0, "milliseconds", products=products)
    tables = CostTables({**TABLES.tables, "latency": latency})
    limits = {"activation_mb": 8.0, "latency_ms": 6.0}
    costs, bounds = limit_rows(limits, tables, SITES)
    ((row, matrix),) = limit_products(limits, tables, SITES).items()
    assert row == len(costs) - 1
    for plan in PLANS:
        x = np.array([plan[c.site] == c.choice for c in SITES.candidates], dtype=float)
        keeps = bool(costs[row] @ x + x @ matrix @ x <= bounds[row] + 1e-12)
        assert keeps == fits(plan, {"latency_ms": 6.0}, tables)
    assert not limit_products({"size_mb": 8.0}, tables, SITES)


def test_readers_on_both_sides_of_one_in_float_agree() -> None:
    sites = Sites((site("a", "x", A4, A8), site("b", "x", A4, A8, FLOAT), site("c", "x", A4, A8)), {})
    costs, bounds = tie_rows(sites)
    for choices in product(*(each.choices for each in sites.sites)):
        plan = dict(zip("abc", choices, strict=True))
        picked = np.array([plan[c.site] == c.choice for c in sites.candidates])
        one_width = len({choice.activation_bits for choice in choices if not choice.is_float}) == 1
        assert bool((costs[:, picked].sum(axis=1) <= bounds + 1e-9).all()) == one_width == agrees(sites.sites, plan)
