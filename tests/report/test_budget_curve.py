from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest

import fxquant
from fxquant import Result
from fxquant.core.facts import BudgetCurve
from fxquant.core.ir import FLOAT
from fxquant.report import frontier, render
from tests.report.test_html import Page
from tests.small import images, small, small_result


@cache
def measured() -> Result:
    options = {"target": "reference", "effort": "fast", "curve": 5}
    return fxquant.quantize(small(), images(), {"average_bits": 5}, options=options, progress=False)


def test_every_measured_plan_is_there_once_and_the_chosen_one_first_of_its_like() -> None:
    result, drawn = measured(), frontier(measured().program)
    assert (drawn["axis"], drawn["unit"]) == ("average_bits", "KL nats")
    assert (drawn["images"], drawn["fewest_images"]) == (30, 8)
    known = {**result.program[BudgetCurve].plans, **result.finalists, result.allocation.estimator: result.allocation}
    distinct = {tuple(plan.choices.items()) for plan in known.values()}
    assert len(drawn["points"]) == len(distinct) >= 5
    assert [point["used"] for point in drawn["points"]] == sorted(point["used"] for point in drawn["points"])
    for point in drawn["points"]:
        assert point["bytes"] == result.costs["size"].of(known[point["name"]].choices)
        assert point["average_bits"] == pytest.approx(point["used"])
        assert point["choices"] == [choice.label for choice in known[point["name"]].choices.values()]
    (chosen,) = [point for point in drawn["points"] if point["chosen"]]
    assert chosen["loss"] == result.allocation.measured_loss


def test_the_chosen_plan_stands_by_the_loss_it_was_compared_by() -> None:
    result = measured()
    better = result.program.with_facts(result.allocation.remeasured(0.0, 6))
    (chosen,) = [point for point in frontier(better)["points"] if point["chosen"]]
    assert chosen["loss"] == result.allocation.measured_loss != 0


def test_without_a_curve_what_was_compared_is_shown() -> None:
    drawn = frontier(small_result().program)
    assert {point["name"] for point in drawn["points"]} == set(small_result().finalists)
    assert frontier(small_result(budget=None).program)["axis"] == "size_mb"
    assert frontier(small_result(budget=None).program)["points"] == []
    assert "What other budgets bring" not in render(small_result(budget=None).report_data())


def test_a_layer_put_in_float_by_hand_has_no_place_on_the_curve() -> None:
    result = small_result()
    plan = replace(result.allocation, choices={**result.allocation.choices, "head": FLOAT}, measured_loss=0.5)
    drawn = frontier(result.with_plan(plan).program)
    assert not any(point["chosen"] for point in drawn["points"])
    assert "checked" in render(result.with_plan(plan).report_data())


def test_choosing_a_point_shows_its_plan_without_a_script() -> None:
    data = measured().report_data()
    text = render(data)
    assert "on 30 calibration images (plans for other budgets on 8 of them" in text
    page, points = Page(text), data["frontier"]["points"]
    labels = [attributes for tag, attributes in page.tags if tag == "label"]
    inputs = [attributes for tag, attributes in page.tags if tag == "input"]
    assert (
        [each["for"] for each in labels] == [each["id"] for each in inputs] == [f"plan{k}" for k in range(len(points))]
    )
    assert {each["name"] for each in inputs} == {"plan"}
    (checked,) = [k for k, each in enumerate(inputs) if "checked" in each]
    assert points[checked]["chosen"]
    for k, point in enumerate(points):
        assert re.search(rf"#plan{k}:checked~\.plan{k}[,{{]", text), "the style shows what was chosen"
        (panel,) = re.findall(rf'<div class="plan plan{k}">(.*?)</div>\n</div>|$', text, re.DOTALL)[:1]
        for layer, label in zip(("stem", "body", "head"), point["choices"], strict=True):
            assert f"{layer} (" in panel
            assert label in panel
