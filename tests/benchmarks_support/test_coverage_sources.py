"""The list of models by task, and models whose package is not installed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import coverage_sources
from benchmarks.coverage import COLUMNS, listed, sections
from benchmarks.coverage_model import measure
from benchmarks.task_table import TASKS
from benchmarks.zoo import NETWORKS
from fxquant.core.errors import OptionError


def test_every_task_has_a_section_and_every_model_a_source() -> None:
    found = sections()
    assert {"Detection", "Segmentation", "Super-resolution", "Recurrent"} < found.keys()
    names = [name.partition(":") for name in listed()]
    assert len({*listed()}) == len(listed())
    assert {source for source, _, _ in names} <= coverage_sources.SOURCES.keys()
    known = {"zoo": set(NETWORKS), "task": set(TASKS)}
    assert [name for source, _, name in names if source in known and name not in known[source]] == []


def test_a_model_without_its_package_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(coverage_sources.SOURCES["spandrel"], package="no_such_package", install="such-a-package")
    monkeypatch.setitem(coverage_sources.SOURCES, "spandrel", missing)
    row = measure("spandrel:SPAN.SPAN")
    assert set(row) == {"model", "skipped"}
    assert "no_such_package is not installed" in row["skipped"]
    assert "pip install such-a-package" in row["skipped"]
    assert COLUMNS["in float"](row) == f"skipped: {row['skipped']}"


def test_a_source_that_is_not_known_is_named_with_those_that_are() -> None:
    with pytest.raises(OptionError, match="zoo:NAME, task:NAME"):
        coverage_sources.build("nowhere:net")


def test_inputs_of_a_task_with_several_are_cut_alike() -> None:
    pytest.importorskip("onnxruntime")
    model, inputs = coverage_sources.build("task:silero_vad")
    assert [len(values) for values in inputs] == [16] * 3
    assert not model.training
