from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fxquant.core.errors import OptionError
from fxquant.core.facts import Settings, Surrogates, usage
from fxquant.core.ir import FLOAT, Choice, Sites
from fxquant.report import coverage, model_bytes
from fxquant.result import Result
from tests.small import small_result


def report(**extras: object) -> dict[str, Any]:
    return small_result().report_data(extras)


def test_is_plain_json_without_nan() -> None:
    text = json.dumps(report(), allow_nan=False)
    assert json.loads(text) == report()


def test_layers_add_up_to_the_plan() -> None:
    result, data = small_result(), report()
    rows = data["layers"]
    assert [row["name"] for row in rows] == ["stem", "body", "head"]
    assert {row["name"]: row["choice"] for row in rows} == result.allocation.to_json()["choices"]
    assert sum(row["bytes"] for row in rows) + result.costs["size"].constant == data["outcome"]["bytes"]
    assert data["outcome"]["bytes"] == result.costs["size"].of(result.allocation.choices)
    assert sum(row["contribution"] for row in rows) == pytest.approx(
        result.sensitivity.predict(result.allocation.choices)
    )
    assert sum(row["share_of_macs"] for row in rows) == pytest.approx(1.0)


def test_layer_losses_are_the_matrix_diagonal() -> None:
    result = small_result()
    for row in report()["layers"]:
        for label, loss in row["losses"].items():
            names = [(c.site, c.choice.label) for c in result.sensitivity.candidates]
            k = names.index((row["name"], label))
            assert loss == result.sensitivity.values[k, k]
        assert row["loss"] == row["losses"][row["choice"]]


def test_next_step_is_the_difference_of_two_plans() -> None:
    result = small_result()
    choices = result.allocation.choices
    steps = [row for row in report()["layers"] if row["next_step"] is not None]
    assert steps
    for row in steps:
        wider = {**choices, row["name"]: Choice.parse(row["next_step"]["choice"])}
        saved = result.sensitivity.predict(choices) - result.sensitivity.predict(wider)
        assert row["next_step"]["loss_saved"] == pytest.approx(saved, abs=1e-12)
        extra = result.costs["size"].of(wider) - result.costs["size"].of(choices)
        assert row["next_step"]["extra_bytes"] == extra > 0


def test_limits_with_slack_and_reach() -> None:
    (limit,) = report()["outcome"]["limits"]
    assert limit["name"] == "average_bits"
    assert limit["lowest"] == 2.0
    assert limit["highest"] == 8.0
    assert limit["used"] + limit["slack"] == pytest.approx(limit["limit"] + 0.0)


def test_plans_hold_the_finalists_and_uniform_plans_that_do_not_fit() -> None:
    data, result = report(), small_result()
    rows = {row["name"]: row for row in data["plans"]}
    assert {"uniform W2A8", "uniform W4A8", "uniform W8A8"} <= set(rows)
    assert not rows["uniform W8A8"]["fits"]
    assert rows["uniform W8A8"]["measured_loss"] is None
    assert rows["uniform W4A8"]["average_bits"] == 4.0
    first = data["plans"][0]
    assert first["chosen"]
    assert first["measured_loss"] == result.allocation.measured_loss == min(result.allocation.finalists.values())


def test_analysis_without_a_budget() -> None:
    data = small_result(budget=None).report_data()
    assert "manual" in small_result(budget=None).summary()
    assert data["outcome"]["status"] == "manual"
    assert data["outcome"]["limits"] == []
    assert data["outcome"]["average_bits"] == 8.0
    assert data["outcome"]["gap"] is None
    assert [row["name"] for row in data["plans"] if row["chosen"]] == ["uniform W8A8"]


def test_manual_plan_stands_in_the_list() -> None:
    manual = small_result().with_plan(
        replace(small_result().allocation, choices={"stem": Choice(2, 8), "body": Choice(8, 8), "head": Choice(2, 8)})
    )
    first = manual.report_data()["plans"][0]
    assert first["name"] == "manual"
    assert first["chosen"]
    assert manual.allocation.used == usage(manual.allocation.choices, {"average_bits": 5.0}, manual.costs)


def test_float_layers_are_counted_with_their_reasons() -> None:
    result = small_result(network="product")
    plan = replace(result.allocation, choices={**result.allocation.choices, "stem": FLOAT})
    shown = coverage(result.with_plan(plan).program)
    assert (shown["quantized"], shown["layers"], shown["in_float"]) == (2, 4, 2)
    assert {"reason": "the plan keeps it in float", "layers": ["stem"]} in shown["reasons"]
    assert shown["sentence"].startswith("2 of 4 layers quantized, 2 in float because: ")
    assert shown["sentence"] in " ".join(result.with_plan(plan).summary().split())
    for why in result.program[Sites].refusals.values():
        assert why in shown["sentence"]


def test_float_layers_cost_their_float_bytes() -> None:
    result = small_result()
    plan = replace(result.allocation, choices={**result.allocation.choices, "head": FLOAT})
    manual = result.with_plan(plan)
    row = manual.report_data()["layers"][2]
    assert row["bytes"] == row["float_bytes"] == 4 * (18 + 3)
    assert row["stored_bits"] == 32
    assert manual.allocation.used == {}
    assert model_bytes(manual.program, manual.allocation.choices) > model_bytes(
        result.program, result.allocation.choices
    )


def test_settings_versions_and_passes_are_there() -> None:
    data = report()
    assert data["asked"]["budget"] == {"average_bits": 5.0}
    assert data["asked"]["settings"]["seed"] == small_result().program[Settings].seed
    assert data["asked"]["inputs"] == [{"name": "x", "shape": ["batch", 1, 8, 8], "type": "float32"}]
    assert {"python", "torch", "numpy", "fxquant"} <= set(data["versions"])
    names = [row["name"].split("(")[0] for row in data["passes"]]
    assert names[0] == "Canonicalize"
    assert "MeasureSensitivity" in names


def test_matrix_is_the_matrix() -> None:
    data = report()["sensitivity"]
    assert np.array_equal(np.array(data["values"]), small_result().sensitivity.values)
    matrices = small_result().program[Surrogates].matrices
    assert [each["estimator"] for each in data["scored"]] == list(matrices)
    assert [each["evaluations"] for each in data["scored"]] == [m.evaluations for m in matrices.values()]
    assert len(data["candidates"]) == len(data["values"])


def test_extras_are_kept_and_checked() -> None:
    data = report(kernels={"stem": "QLinearConv"}, bytes_on_disk=9)
    assert data["measured"]["bytes_on_disk"] == 9
    assert [row["kernel"] for row in data["layers"]] == ["QLinearConv", None, None]
    with pytest.raises(OptionError, match="accuracy_table"):
        report(accuracy_table=[])


def with_allocation(**changes: Any) -> Result:
    result = small_result()
    return replace(result, program=result.program.with_facts(replace(result.allocation, **changes)))


def test_one_column_holds_losses_of_one_rounding() -> None:
    chosen = small_result().allocation
    better = with_allocation(measured_loss=0.0, compared_loss=chosen.measured_loss)
    rows = {row["name"]: row["measured_loss"] for row in better.report_data()["plans"] if row["measured_loss"]}
    assert rows == chosen.finalists
    # A plan that no finalist has: its row is measured as theirs were.
    moved = {**chosen.choices, "stem": Choice(2, 8), "body": Choice(2, 8), "head": Choice(8, 8)}
    found = with_allocation(choices=moved, estimator="swapped", measured_loss=0.125, compared_loss=0.25, finalists={})
    assert (found.report_data()["plans"][0]["name"], found.report_data()["plans"][0]["measured_loss"]) == (
        "swapped",
        0.25,
    )
    assert found.report_data()["outcome"]["measured_loss"] == 0.125
    assert "0.125 KL nats; 0.25 before the last rounding" in " ".join(found.summary().split())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": "optimal", "estimator": "hawq"}, "by the model of hawq no plan within the limits has a lower loss"),
        ({"status": "feasible", "estimator": "hawq"}, "the best that the solver found by the model of hawq"),
        ({"status": "measured"}, "among the plans that were tried"),
        ({"minimized": "average_bits"}, "average_bits was minimized by bisection"),
    ],
)
def test_a_status_says_no_more_than_was_proved(changes: dict[str, Any], said: str) -> None:
    text = with_allocation(**changes).report_data()["outcome"]["status_text"]
    assert said in text
    assert "time ran out" not in text
    assert ("proved: by the model" in text) == (changes.get("status", "optimal") == "optimal")


def test_what_was_minimized_is_not_shown_as_asked_for() -> None:
    found = with_allocation(minimized="average_bits", limits={}, quality={"loss": 0.1}, quality_limits={"loss": 0.2})
    minimized, loss = found.report_data()["outcome"]["limits"]
    assert minimized == {
        "name": "average_bits",
        "limit": None,
        "used": found.allocation.used["average_bits"],
        "slack": None,
    }
    assert (loss["limit"], loss["used"]) == (0.2, 0.1)
    assert "Minimized average_bits: 4.8 bits" in found.summary()
    assert "Budget average_bits" not in found.summary()
    assert "over budget" not in found.summary()
    assert found.report_data()["asked"]["budget"] == {"loss": 0.2, "minimize": "average_bits"}


def test_losses_carry_the_unit_of_what_was_measured() -> None:
    outcome = with_allocation(loss="mse").report_data()["outcome"]
    assert (outcome["loss_unit"], outcome["objective_unit"]) == ("relative squared error", "KL nats")
