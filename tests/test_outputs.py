from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

import fxquant
from fxquant.core.errors import MissingDependencyError, OptionError, OutputError
from fxquant.outputs import add_to_report, check_packages, known_extras, output_folder, write_outputs, write_reports
from tests.small import small_result


def fail_with_scores(folder: Path) -> None:
    (folder / "scores").mkdir()
    raise RuntimeError


def test_folder_made_for_nothing_goes_away_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), output_folder(tmp_path / "a" / "b"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_folder_with_something_in_it_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(RuntimeError), output_folder(tmp_path):
        raise RuntimeError
    with pytest.raises(RuntimeError), output_folder(tmp_path / "new") as folder:
        fail_with_scores(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "new"]


def test_earlier_result_is_refused_unless_resumed(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    with pytest.raises(OptionError, match="holds scores of an earlier run"), output_folder(tmp_path):
        pass
    with output_folder(tmp_path, resume=True) as folder:
        assert folder == tmp_path


def test_path_under_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), output_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(OutputError, match="cannot write"):
        write_outputs(small_result(), tmp_path / "file" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_outputs_replace_those_of_another_result(tmp_path: Path) -> None:
    for stale in ("model.onnx", "sensitivity_pairs.npz", "held_out.safetensors"):
        (tmp_path / stale).write_text("old")
    (tmp_path / "mine.txt").write_text("keep")
    written = write_outputs(small_result(), tmp_path)
    assert [path.name for path in written] == ["plan.json", "report.html", "report.json"]
    names = {p.name for p in tmp_path.iterdir()}
    assert "mine.txt" in names
    assert not {"model.onnx", "sensitivity_pairs.npz"} & names
    assert not any(name.startswith(".") for name in names)
    assert fxquant.load(tmp_path).allocation == small_result().allocation


def test_extras_are_known_again_for_the_same_plan_only(tmp_path: Path) -> None:
    result = small_result()
    assert known_extras(result, tmp_path) == {}
    write_reports(result, tmp_path, {"bytes_on_disk": 7})
    assert known_extras(result, tmp_path) == {"bytes_on_disk": 7}
    assert known_extras(small_result(budget=None), tmp_path) == {}
    (tmp_path / "report.json").write_text("{")
    assert known_extras(result, tmp_path) == {}


def test_a_report_tells_of_what_was_measured_since(tmp_path: Path) -> None:
    result = small_result()
    assert not add_to_report(result, tmp_path, {"bytes_on_disk": 9})
    assert list(tmp_path.iterdir()) == []
    write_reports(result, tmp_path, {"bytes_on_disk": 7, "data": "digits"})
    assert add_to_report(result, tmp_path, {"bytes_on_disk": 9, "parity": {"steps": math.inf}})
    assert known_extras(result, tmp_path) == {"bytes_on_disk": 9, "data": "digits", "parity": {"steps": None}}
    assert "<dd>9 B</dd>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_missing_packages_are_found_first(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages("onnxruntime")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match="report"):
        check_packages("reference")


def test_the_report_of_pytorchs_integers_names_the_kernel_of_each_layer(tmp_path: Path) -> None:
    write_outputs(small_result("fx_int8"), tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert {row["kernel"] for row in data["layers"] if row["kind"] == "conv"} == {"onednn.qconv2d_pointwise"}
    assert [row["kernel"] for row in data["layers"] if row["kind"] == "linear"] != [None]
    assert "onednn.qconv2d_pointwise" in (tmp_path / "report.html").read_text()
