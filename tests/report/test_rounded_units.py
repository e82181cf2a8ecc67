from __future__ import annotations

import math
from dataclasses import replace

from fxquant.core.facts import Rounding, UnitRecord
from fxquant.report import render, rounding, summary
from fxquant.result import Result
from tests.small import small_result


def rounded() -> Result:
    result = small_result()
    units = (
        UnitRecord("stem", "pdquant", 0.5, 0.25, True, seconds=1.5, sites=("stem",)),
        UnitRecord("body", "pdquant", 0.75, math.nan, False, "diverged: <b>", sites=("body",)),
    )
    made = Rounding(result.allocation.choices, "pdquant", units=units, notes=("no correction",))
    return replace(result, program=result.program.with_facts(made))


def test_nearest_says_so() -> None:
    shown = rounding(small_result().program)
    assert shown["sentence"] == "Weights rounded by nearest"
    assert not shown["units"]


def test_units_kept_and_left_are_counted_and_explained() -> None:
    shown = rounding(rounded().program)
    assert shown["sentence"].startswith("Weights rounded by pdquant, 1 of 2 units kept; 1 stayed as they were")
    assert shown["units"][0] == {
        "name": "stem",
        "sites": ["stem"],
        "method": "pdquant",
        "before": 0.5,
        "after": 0.25,
        "kept": True,
        "reason": "",
        "seconds": 1.5,
    }
    assert shown["units"][1]["after"] is None


def test_an_algorithm_judged_as_a_whole_has_no_units_to_count() -> None:
    result = small_result()
    record = UnitRecord("stem", "gptq", 0.5, 0.25, True)
    made = Rounding(result.allocation.choices, "gptq", units=(record,))
    shown = rounding(result.program.with_facts(made))
    assert shown["sentence"] == "Weights rounded by gptq"
    assert shown["units"][0]["name"] == "whole network"


def test_the_terminal_and_the_page_show_it() -> None:
    assert "1 of 2 units kept" in summary(rounded().program)
    assert "units kept" not in summary(small_result().program)
    html = render(rounded().report_data())
    assert "1 of 2 units kept" in html
    assert "no: diverged: &lt;b&gt;" in html
    assert "no correction." in html
