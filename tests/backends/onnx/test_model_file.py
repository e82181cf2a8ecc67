from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from fxquant.backends.onnx import ALIGNMENT, SMALLEST, OnnxOptions, executable, export_onnx, kernel_report
from fxquant.core.errors import LoweringError
from tests.backends.onnx.test_stem import quantized

INPUT = torch.randn(3, 4, 8, 8)


def network() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return quantized(torch.nn.Conv2d(4, 32, 3), 8)


@pytest.mark.parametrize("options", [OnnxOptions(external_data=True), OnnxOptions(largest_file=1000)])
def test_weights_in_a_file_of_their_own_give_the_same_answers(tmp_path: Path, options: OnnxOptions) -> None:
    one = export_onnx(network(), tmp_path / "one.onnx")
    two = export_onnx(network(), tmp_path / "two.onnx", options=options)
    data = tmp_path / "two.onnx.data"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.onnx", "two.onnx", "two.onnx.data"]
    assert two.bytes == two.path.stat().st_size + data.stat().st_size
    assert two.path.stat().st_size < one.bytes
    stored = [t for t in onnx.load(two.path, load_external_data=False).graph.initializer if t.external_data]
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in stored]
    assert {place["location"] for place in places} == {"two.onnx.data"}
    assert all(int(place["offset"]) % ALIGNMENT == 0 and int(place["length"]) >= SMALLEST for place in places)
    assert torch.equal(executable(two.path)((INPUT,)), executable(one.path)((INPUT,)))
    assert kernel_report(two.path) == kernel_report(one.path)
    onnx.checker.check_model(str(two.path), full_check=True)


def test_a_file_below_the_limit_stays_one(tmp_path: Path) -> None:
    report = export_onnx(network(), tmp_path / "model.onnx", options=OnnxOptions(largest_file=10**6))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert report.bytes == report.path.stat().st_size


def test_writing_again_replaces_both_files(tmp_path: Path) -> None:
    options = OnnxOptions(external_data=True)
    first = export_onnx(network(), tmp_path / "model.onnx", options=options).path.read_bytes()
    again = export_onnx(network(), tmp_path / "model.onnx", options=options)
    assert again.path.read_bytes() == first
    assert len(list(tmp_path.iterdir())) == 2


def test_a_model_that_is_not_valid_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("no")

    (tmp_path / "model.onnx").write_text("old")
    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(LoweringError, match="not valid: no"):
        export_onnx(network(), tmp_path / "model.onnx", options=OnnxOptions(external_data=True))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_new_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    report = export_onnx(network(), tmp_path / "model.onnx", options=OnnxOptions(external_data=True))
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
    assert report.path.exists()
