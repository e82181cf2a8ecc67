"""Files with anything changed in them: each is read as it is, or ends in one error of ours."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant.cli import as_text, inspect
from fxquant.core.errors import InputError
from fxquant.core.facts import BitAllocation, Ranges, SensitivityMatrix, read_target
from fxquant.core.host import TimingCache
from fxquant.core.ir import Choice
from fxquant.core.storage import ScoreStore
from fxquant.outputs import known_extras, write_outputs
from fxquant.result import Result
from tests.small import small_result

FUZZ = settings(
    max_examples=int(os.environ.get("FXQUANT_FUZZ", "60")),
    deadline=None,
    derandomize="FXQUANT_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""`FXQUANT_FUZZ=5000` searches at length, anew each time."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    write_outputs(small_result("onnxruntime"), folder)
    return folder


ODD: list[Any] = [None, True, -1, 0, 1, 2**63, 10**200, 1e308, -1e-320, 0.5, "", "x", "../../x", "/etc/passwd", "\0"]
ODD += ["a" * 5000, "W4A8", "W99A8", "<script>", "\ud800", "re:(a+)+", [], {}, [[]], [None], {"a": 1}, ["W4A8"]]


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to every value of a document."""
    if not isinstance(document, dict | list):
        return [path]
    inner = document.items() if isinstance(document, dict) else list(enumerate(document))[:3]
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, document: Any) -> str:
    """Draw a document with one value, key or byte changed, as text."""
    made = copy.deepcopy(document)
    path = draw(st.sampled_from([place for place in places(made) if place]))
    owner = made
    for key in path[:-1]:
        owner = owner[key]
    way = draw(st.sampled_from(["value", "value", "gone", "key", "text"]))
    if way == "value":
        owner[path[-1]] = draw(st.sampled_from(ODD))
    elif way == "gone" or (way == "key" and isinstance(owner, list)):
        owner.pop(path[-1])
    elif way == "key":
        owner[draw(st.sampled_from(["x", "../y", "\0", "choices"]))] = owner.pop(path[-1])
    text = json.dumps(made)
    if way == "text":
        start = draw(st.integers(0, len(text)))
        twist = draw(st.sampled_from(["", '"kind": "plan", ', "[" * 5000, "1" * 5000, "NaN", "1e999", "\ufeff", "}"]))
        text = text[:start] + twist + text[start + draw(st.integers(0, 3)) :]
    return text


PLAN = {"kind": "plan", "version": 1} | BitAllocation(
    {"stem": Choice(8, 8), "head": Choice(4, 8)},
    *("diagonal", 0.5, 0.25, 0.5, "feasible"),
    used={"average_bits": 4.5},
    limits={"average_bits": 5.0},
    measured_loss=0.5,
    finalists={"diagonal": 0.5},
).to_json()
TARGET: dict[str, Any] = {
    "kind": "target",
    "version": 1,
    "name": "npu",
    "kernels": {"conv": "c", "linear": "l"},
    "joins": ["add"],
    "weight_bits": [4, 8],
    "activation_bits": [8],
    "storage_bits": {"4": 4, "8": 8},
    "granularity": "per_tensor",
    "latency": [{"layers": "*", "precision": "W8A8", "ms": 0.5}],
}


def refused(read: Callable[[], object]) -> None:
    """Read; any error but that of bad input fails the test."""
    with suppress(InputError):
        read()


def read_plan(path: Path) -> None:
    plan = BitAllocation.from_json(path)
    _ = plan.to_json(), repr(plan), plan._repr_html_(), plan.slack
    json.dumps(plan.to_json(), allow_nan=False)


@FUZZ
@given(changed(PLAN))
def test_plans(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    refused(lambda: read_plan(path))


@FUZZ
@given(changed(TARGET))
def test_targets(tmp_path: Path, text: str) -> None:
    path = tmp_path / "target.json"
    path.write_text(text, encoding="utf-8")
    refused(lambda: read_target(path))


@FUZZ
@given(st.data())
def test_result_folders(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["report.json", "plan.json"]))
    text = data.draw(changed(json.loads((saved / name).read_text())))
    (tmp_path / name).write_text(text, encoding="utf-8")
    extras = known_extras(small_result("onnxruntime"), tmp_path)
    assert isinstance(extras, dict)


@settings(FUZZ, max_examples=max(10, FUZZ.max_examples // 6))
@given(data=st.data())
def test_results(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    text = data.draw(changed(json.loads((saved / "result.json").read_text())))
    folder = tmp_path / "result"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    (folder / "result.json").write_text(text, encoding="utf-8")

    def read() -> None:
        result = Result.load(folder)
        _ = result.summary(), repr(result), result._repr_html_()

    refused(read)


@pytest.mark.filterwarnings("ignore:.*is damaged")
@FUZZ
@given(data=st.data())
def test_kept_times_and_scores(tmp_path: Path, data: st.DataObject) -> None:
    timing = {"median": 1.0, "low": 0.9, "high": 1.1, "outliers": 0.0, "waiting": 0.0}
    kept = {"kind": "timings", "version": 1, "key": "k", "belongs": {}, "timings": [timing]}
    cache = TimingCache(tmp_path)
    path = cache._path("k")
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data.draw(changed(kept)), encoding="utf-8")
    assert isinstance(cache.get("k", 1), list | None)
    header = {"kind": "scores", "version": 2, "model": "a", "data": "b"}
    (tmp_path / "identity.json").write_text(data.draw(changed(header)), encoding="utf-8")
    refused(lambda: ScoreStore(tmp_path, {"model": "a", "data": "b"}))


def arrays_of(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


ODD_ARRAYS = [
    np.zeros(0),
    np.array("x"),
    np.array("[" * 10**5),
    np.array("{}"),
    np.full((3, 3), np.nan),
    np.zeros((1,) * 20),
]
ODD_ARRAYS += [np.array(True), np.array(1j), np.full(2, -(2**62)), np.array(b"x"), np.array("2020-01-01", dtype="M8")]


@FUZZ
@given(data=st.data())
def test_arrays_of_results(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    readers: dict[str, Callable[[Path], object]] = {
        "ranges.npz": Ranges.load,
        "sensitivity_diagonal.npz": SensitivityMatrix.load,
    }
    name = data.draw(st.sampled_from(sorted(readers)))
    arrays = arrays_of(saved / name)
    key = data.draw(st.sampled_from(sorted(arrays)))
    if key == "header" and data.draw(st.booleans()):
        arrays[key] = np.array(data.draw(changed(json.loads(str(arrays[key])))).encode("utf-8", "replace").decode())
    else:
        arrays[key] = data.draw(st.sampled_from(ODD_ARRAYS))
    with (tmp_path / name).open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    refused(lambda: readers[name](tmp_path / name))


@FUZZ
@given(data=st.data())
def test_onnx_files(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Sizes, names, types, places of weights and single bytes of a model are changed."""
    model = onnx.load_model(saved / "model.onnx")
    tensor = data.draw(st.sampled_from(list(model.graph.initializer)))
    node = data.draw(st.sampled_from(list(model.graph.node)))
    text = data.draw(st.sampled_from(["", "x", "\0", "../../etc/passwd", "</script>", "a" * 5000]))
    way = data.draw(st.sampled_from(["dims", "type", "place", "node", "domain", "bytes", "edge"]))
    if way == "dims":
        tensor.dims[:] = data.draw(st.sampled_from([[2**62], [-1], [0], [10**12, 10**12], [1] * 200]))
    elif way == "type":
        tensor.data_type = data.draw(st.integers(-1, 60))
    elif way == "place":
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=text)
    elif way == "node":
        node.op_type = node.name = text
    elif way == "domain":
        model.opset_import.add(domain=text, version=data.draw(st.integers(-(2**63), 2**63 - 1)))
    elif way == "edge":
        node.input.append(text)
        node.output[0] = node.input[0]
    raw = bytearray(model.SerializeToString())
    if way == "bytes":
        for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=5)):
            raw[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "model.onnx"
    path.write_bytes(raw)
    refused(lambda: as_text(inspect(path, runtime=False)))
