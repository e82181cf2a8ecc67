from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fxquant.core.errors import OptionError
from fxquant.core.facts import CostTable, CostTables, Noise
from fxquant.core.host import Timing
from fxquant.core.ir import FLOAT, Candidate, Choice

CANDIDATES = tuple(Candidate(site, Choice(bits, 8)) for site in ("a", "b") for bits in (4, 8))
TABLE = CostTable(CANDIDATES, np.array([1.0, 2.0, 10.0, 20.0]), constant=100.0, float_cost=400.0, unit="bytes")


def test_cost_of_a_plan() -> None:
    assert TABLE.of({"a": Choice(8, 8), "b": Choice(4, 8)}) == 112.0
    assert TABLE.of({}) == 100.0


PEAK = CostTable(
    CANDIDATES, np.array([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 4.0]]), 100.0, 400.0, "bytes", np.array([3.0, 0.0])
)


def test_the_largest_of_several_sums() -> None:
    assert PEAK.of({"a": Choice(8, 8), "b": Choice(4, 8)}) == 105.0
    assert PEAK.of({"a": Choice(4, 8), "b": Choice(8, 8)}) == 104.0
    assert PEAK.of({}) == 103.0
    values, constants = TABLE.rows
    assert values.shape == (1, 4)
    assert constants.tolist() == [100.0]


def reread(table: CostTable) -> CostTable:
    return CostTable.from_json(json.loads(json.dumps(table.to_json())), table.candidates)


def test_json_round_trip_and_a_sum_is_written_as_before() -> None:
    for table in (TABLE, PEAK):
        back = reread(table)
        assert np.array_equal(back.values, table.values)
        assert (back.constant, back.float_cost, back.unit) == (100.0, 400.0, "bytes")
    assert back.offsets is not None
    assert back.offsets.tolist() == [3.0, 0.0]
    assert set(TABLE.to_json()) == {"values", "constant", "float_cost", "unit"}
    old = {"values": [1, 2, 3, 4], "constant": 0, "float_cost": 9, "unit": "bits"}
    assert CostTable.from_json(old, CANDIDATES).of({"b": Choice(8, 8)}) == 4.0


@pytest.mark.parametrize(
    ("values", "offsets"),
    [
        (np.zeros(3), None),
        (np.full(4, np.nan), None),
        (np.zeros((2, 4)), None),
        (np.zeros((2, 4)), np.zeros(3)),
        (np.zeros(4), np.zeros(1)),
        (np.zeros((0, 4)), np.zeros(0)),
        (np.zeros((1, 1, 4)), np.zeros((1, 1))),
        (np.zeros((1, 4)), np.full(1, np.nan)),
    ],
)
def test_tables_are_checked_when_made(values: NDArray[np.float64], offsets: NDArray[np.float64] | None) -> None:
    with pytest.raises(OptionError, match="cost"):
        CostTable(CANDIDATES, values, 0.0, 1.0, "bytes", offsets)
    with pytest.raises(OptionError, match="not finite"):
        replace(TABLE, constant=np.inf)


def test_costs_that_were_not_estimated() -> None:
    tables = CostTables({"size": TABLE})
    assert tables["size"] is TABLE
    with pytest.raises(OptionError, match="cost 'latency' was not estimated; available: size"):
        tables["latency"]


def test_a_cost_of_two_choices_is_paid_where_both_are_chosen() -> None:
    candidates = tuple(Candidate(site, choice) for site in ("a", "b") for choice in (Choice(8, 8), FLOAT))
    products = np.zeros((4, 4))
    products[0, 3] = products[3, 0] = 0.25
    table = CostTable(candidates, np.array([1.0, 2.0, 1.0, 2.0]), 0.5, 4.5, "milliseconds", products=products)
    assert table.of({"a": Choice(8, 8), "b": FLOAT}) == 4.0
    assert table.of({"a": FLOAT, "b": Choice(8, 8)}) == 3.5
    again = reread(table)
    assert again.products is not None
    assert (again.products == products).all()
    assert again.of({"a": Choice(8, 8), "b": FLOAT}) == 4.0
    for wrong in (-products, np.triu(products), np.zeros((2, 2)), products * np.nan):
        with pytest.raises(OptionError, match="cost products in milliseconds"):
            replace(table, products=wrong)


def test_noise_goes_with_a_table_and_is_checked() -> None:
    noise = Noise.of([Timing(1.0, 0.1, 0.2, 0.0), Timing(2.0, 0.3, 0.0, 0.4), Timing(3.0, 0.2, 0.1, 0.1)], 0.05)
    assert (noise.spread, noise.error) == (0.2, 0.05)
    assert [noise.outliers, noise.waiting] == pytest.approx([0.1, 0.1])
    assert reread(replace(TABLE, noise=noise)).noise == noise
    with pytest.raises(OptionError, match="is no noise"):
        Noise(0.1, 1.5, 0.0)
