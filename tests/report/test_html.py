from __future__ import annotations

import importlib
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fxquant.core.errors import MissingDependencyError, OutputError
from fxquant.report import FULL_MATRIX, MOST_ROWS, bars, heat_map, render, tiles
from tests.small import small_result

COMPARISON = [
    {"name": "float", "accuracy": 0.99, "bytes": 1000, "milliseconds": 2.0, "low": 1.9, "high": 2.1},
    {"name": "mixed", "accuracy": 0.98, "bytes": 200, "milliseconds": 1.0, "low": 0.9, "high": 1.1},
]
VOID = {"meta", "line", "rect", "path", "br", "hr", "link", "img", "input"}


class Page(HTMLParser):
    """Collects tags and text, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] == "rect" and tag != "rect":
            self.open.pop()
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def rows(count: int) -> list[dict[str, Any]]:
    first = small_result().report_data()["layers"][0]
    return [{**first, "name": f"block.{k}.conv"} for k in range(count)]


def matrix(count: int, labels: tuple[str, ...]) -> dict[str, Any]:
    candidates = [{"site": f"block.{k}.conv", "choice": label} for k in range(count) for label in labels]
    n = len(candidates)
    values = [[float(i == j) * (1 + i) - 1e-3 * (i != j) for j in range(n)] for i in range(n)]
    return {"candidates": candidates, "values": values, "unit": "KL nats"}


def test_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    path = small_result().report(tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import|src=", text)
    assert "prefers-color-scheme:dark" in text
    assert any(tag == "meta" and attributes.get("name") == "viewport" for tag, attributes in page.tags)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_page_answers_the_questions() -> None:
    data = small_result().report_data(
        {"comparison": COMPARISON, "kernels": {"stem": "QLinearConv"}, "parity": {"LSB": 1}}
    )
    text = " ".join(Page(render(data)).text)
    for shown in (
        "3 of 3",
        "average_bits",
        "uniform W4A8",
        "stem",
        "QLinearConv",
        "98.0 %",
        "LSB",
        "torch",
        '"seed": 0',
    ):
        assert shown in text
    titles = [tag for tag, _ in Page(render(data)).tags if tag == "title"]
    assert len(titles) > 3 + 9


def test_page_shows_curve_ranges_kernels_and_latency() -> None:
    data = small_result().report_data({"kernels": {"stem": "QLinearConv", "body": "QLinearConv", "head": "float"}})
    data["outcome"]["latency"] = {"predicted_ms": 1.25, "float_ms": 5.0, "noise": None}
    page = Page(render(data))
    dots = [attributes for tag, attributes in page.tags if tag == "label"]
    assert len(dots) == len(data["frontier"]["points"]) == 3
    text = " ".join(" ".join(page.text).split())
    for row in data["edges"]:
        assert f"{row['scale']:.4g}" in text
        assert f"{row['sqnr_db']:.1f} dB" in text
    for row in data["layers"]:
        assert f"{row['weight_sqnr_db']:.1f} dB" in text
    assert "QLinearConv 2 stem, body" in text
    assert "Latency 1.25 ms predicted, float 5 ms" in text
    assert "Every plan that was measured, on 30 calibration images" in text
    assert "fxquant check DIR" in text
    assert "activation_bits=(4, 8)" in text


def test_page_shows_operands_where_both_were_scored() -> None:
    data = small_result().report_data()
    data["operands"] = [{"name": "stem", "choice": "W4A4", "weights": 0.125, "activations": None, "both": 0.5}]
    text = " ".join(" ".join(Page(render(data)).text).split())
    assert "stem W4A4 0.125 – 0.5" in text
    assert "activation_bits=(4, 8)" not in text


def test_page_shows_what_check_found() -> None:
    pair = {"reference": "exact", "runtime": "onnxruntime", "agreement": 1.0, "mean_step": 0.25, "max_step": 2.0}
    pair |= {"layer_step": 1.0, "within": True, "broken": None, "first": None}
    wrong = {**pair, "runtime": "fx_int8", "agreement": None, "within": False, "broken": "<b>stem</b>", "layer_step": 3}
    found = {"images": 8, "edges": 4, "limits": {"layer_step": 1}, "pairs": [pair, wrong], "within": False}
    page = Page(render(small_result().report_data({"check": found})))
    text = " ".join(" ".join(page.text).split())
    assert "exact onnxruntime 100 % 0.25 2 1 yes" in text
    assert "exact fx_int8 – 0.25 2 3 no, first at <b>stem</b>" in text
    assert "fxquant check DIR" not in text


def test_page_of_an_analysis_and_of_a_net_with_float_layers() -> None:
    assert "No budget" in render(small_result(budget=None).report_data())
    text = render(small_result(network="product").report_data())
    assert "why it stays in float" in text


def test_headline_prefers_what_was_measured() -> None:
    plain = {tile["label"]: tile["value"] for tile in tiles(small_result().report_data())}
    assert "Measured KL loss" in plain
    measured = {tile["label"]: tile for tile in tiles(small_result().report_data({"comparison": COMPARISON}))}
    assert measured["Accuracy"]["value"] == "98.0 %"
    assert measured["Accuracy"]["note"] == "float 99.0 %"
    assert measured["Time for one image"] == {"label": "Time for one image", "value": "1 ms", "note": "float 2 ms"}
    noisy = [COMPARISON[0], {**COMPARISON[1], "high": 3.0}]
    shown = {tile["label"]: tile for tile in tiles(small_result().report_data({"comparison": noisy}))}
    assert shown["Time for one image"]["note"].startswith("too noisy to compare: 0.9–3 ms")


def test_bars_stand_for_bits() -> None:
    layers = [{**rows(1)[0], "weight_bits": bits, "activation_bits": 8} for bits in (2, 8, 32)]
    drawn = bars(layers)
    assert [bar["height"] for bar in drawn["bars"]] == [37.5, 150.0, 150.0]
    assert [bar["class"] for bar in drawn["bars"]] == ["b2", "b8", "bf"]
    assert [entry["label"] for entry in drawn["legend"]] == ["2 bits", "8 bits", "float"]
    assert len({bar["width"] for bar in drawn["bars"]}) == 1
    assert not bars(rows(200))["labels"]


@pytest.mark.parametrize(
    ("count", "labels", "side", "noted"),
    [
        (3, ("W4A8",), 3, ""),
        (FULL_MATRIX // 2 + 1, ("W2A8", "W4A8"), FULL_MATRIX // 2 + 1, "One row"),
        (MOST_ROWS + 9, ("W4A8",), MOST_ROWS, "Only the"),
    ],
)
def test_large_matrices_are_drawn_smaller(count: int, labels: tuple[str, ...], side: int, noted: str) -> None:
    layers = [{**row, "choice": "W4A8"} for row in rows(count)]
    heat = heat_map(matrix(count, labels), layers)
    assert len({cell["y"] for cell in heat["cells"]}) == side
    assert noted in heat["note"]
    assert {cell["class"] for cell in heat["cells"]} == {"hot", "cold"}
    assert max(float(cell["strength"]) for cell in heat["cells"]) == 1.0


def test_matrix_of_zeros_is_drawn() -> None:
    empty = matrix(2, ("W4A8",))
    empty["values"] = [[0.0, 0.0], [0.0, 0.0]]
    assert heat_map(empty, rows(2))["cells"] == []


def test_unwritable_path_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*report\.html"):
        small_result().report(tmp_path / "file" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_missing_jinja_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> ModuleType:
        if name == "jinja2":
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingDependencyError, match=r'pip install "fxquant\[report\]"'):
        small_result().report(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
