from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fxquant.core.facts import CostTable, CostTables, Noise
from fxquant.core.host import Speed, printable
from fxquant.report import (
    COLUMNS,
    bytes_text,
    comparison,
    count_text,
    latency_text,
    limit_text,
    loss_text,
    most_sensitive,
    percent_text,
    speed_table,
    summary,
    table_text,
)
from fxquant.report import terminal as module
from tests.small import small_result


def test_summary_names_every_layer_and_the_count() -> None:
    text = summary(small_result().program)
    assert "3 of 3 layers quantized" in text
    for name in ("stem", "body", "head", "uniform W8A8", "over budget", "Budget average_bits"):
        assert name in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert small_result().summary() == text


def test_long_and_hostile_names_keep_the_width_and_the_numbers() -> None:
    text = table_text(("layer", "bytes"), [("x" * 300, "123.4 kB"), ("a\x1b[31m[red]b", "1 B")])
    assert "123.4 kB" in text
    assert "\x1b" not in text
    assert "[red]b" in text
    assert max(map(len, text.splitlines())) <= COLUMNS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(57686), "57.69 kB"),
        (bytes_text(12), "12 B"),
        (bytes_text(3.2e6), "3.2 MB"),
        (count_text(9437184), "9.44 M"),
        (loss_text(None), "–"),
        (loss_text(float("nan")), "–"),
        (loss_text(0.0), "0"),
        (loss_text(-3.21e-6), "-3.2e-06"),
        (percent_text(0.125), "12.5 %"),
        (percent_text(0.0), "0 %"),
        (percent_text(1.0), "100 %"),
        (percent_text(None), "–"),
        (limit_text("size_mb", 0.2), "0.2 MB"),
        (limit_text("size_mb", None), "–"),
        (printable("conv\x1b\n1"), "conv??1"),
    ],
)
def test_numbers_for_people(text: str, expected: str) -> None:
    assert text == expected


def test_comparison_drops_times_of_another_run() -> None:
    speed = Speed("mixed", 1.0, 0.9, 1.1)
    rows = comparison([{"name": "uniform 8", "bytes": 10, "milliseconds": 5.0}, {"name": "mixed", "bytes": 5}], [speed])
    assert rows[0] == {"name": "uniform 8", "bytes": 10}
    assert rows[1] == {"name": "mixed", "bytes": 5, "milliseconds": 1.0, "low": 0.9, "high": 1.1}
    table = speed_table(rows)
    assert "0.9–1.1" in table
    assert "accuracy" not in table


def test_predicted_milliseconds_are_shown_with_their_noise() -> None:
    result = small_result()
    candidates = result.costs["size"].candidates
    table = CostTable(
        candidates, np.ones(len(candidates)), 0.5, 9.0, "milliseconds", noise=Noise(0.031, 0.125, 0.4, 0.02)
    )
    timed = replace(result, program=result.program.with_facts(CostTables({**result.costs.tables, "latency": table})))
    text = " ".join(summary(timed.program).split())
    assert "Latency 3.5 ms predicted, float 9 ms; rounds spread by 3.1 %, 12.5 % outliers, 40.0 % of the time" in text
    assert "Latency" not in summary(result.program)
    assert latency_text({"predicted_ms": 3.5, "float_ms": 9.0, "noise": None}) == "Latency 3.5 ms predicted, float 9 ms"


def test_a_processor_without_int8_products_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "int8_instructions", lambda: "")
    assert "This processor has no int8 products" in summary(small_result().program)
    monkeypatch.setattr(module, "int8_instructions", lambda: "AVX512 VNNI")
    assert "int8 products" not in summary(small_result().program)


def test_the_most_sensitive_layers_come_as_an_option() -> None:
    shown = most_sensitive(small_result().program)
    assert shown is not None
    assert shown["option"].startswith("--keep-float ")
    assert shown["option"] in " ".join(summary(small_result().program).split())
    matrix = small_result().sensitivity
    widest = {c.site: max(float(matrix.values[k, k]), 0.0) for k, c in enumerate(matrix.candidates)}
    assert sum(widest[name] for name in shown["layers"]) == pytest.approx(shown["share"] * sum(widest.values()))
    assert shown["share"] >= 0.5
    assert sum(widest[name] for name in shown["layers"][:-1]) < 0.5 * sum(widest.values())
