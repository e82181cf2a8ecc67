"""Weights of every form: what ONNX Runtime unpacks, which kernels it runs, how many bytes the file has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from fxquant.backends.onnx import (
    GraphBuilder,
    OnnxOptions,
    PackedWeights,
    executable,
    export_onnx,
    inspect_onnx,
    kernel_report,
    session_options,
    to_onnx,
)
from fxquant.core.storage import packed_bytes
from tests.backends.onnx.weight_forms import FORMS, OF_EACH_KIND, Rows, mixed, row_tables, uniform, with_integers

PLAIN = OnnxOptions(packed=False)
INTEGERS = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)


def unpacked(weights: list[tuple[Rows, int]], folds_all: bool = True) -> tuple[list[Rows], onnx.ModelProto]:
    """Return what ONNX Runtime makes of weights with their axes of channels, and the file."""
    builder = GraphBuilder()
    packed = PackedWeights(builder, folds_all)
    outputs = []
    for index, (weight, axis) in enumerate(weights):
        value, _ = packed.add(weight, axis, "w")
        builder.emit("Identity", [value], [f"out{index}"])
        outputs.append(helper.make_tensor_value_info(f"out{index}", TensorProto.INT8, weight.shape))
    packed.write()
    model = builder.model([], outputs, "weights")
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1))
    return session.run(None, {}), model


@pytest.mark.parametrize("folds_all", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back(form: str, folds_all: bool) -> None:
    shapes = [(64, 150), (64, 150), (24, 7, 3, 3), (10, 31), (1, 1), (300, 260), (4, 3840)]
    weights = [
        (FORMS[form](shape[0], int(np.prod(shape[1:])), seed).reshape(shape), 0) for seed, shape in enumerate(shapes)
    ]
    found, _ = unpacked(weights, folds_all)
    for (weight, _), back in zip(weights, found, strict=True):
        assert np.array_equal(back, weight)


@pytest.mark.parametrize("form", ["3 bits", "4 levels", "4 levels a row", "rows of several widths"])
def test_channels_may_be_on_another_axis(form: str) -> None:
    rows = FORMS[form](96, 200, 0)
    weights = [
        (np.ascontiguousarray(rows.T), 1),
        (np.ascontiguousarray(np.moveaxis(rows.reshape(96, 8, 5, 5), 0, 2)), 2),
    ]
    found, _ = unpacked(weights)
    assert all(np.array_equal(back, weight) for (weight, _), back in zip(weights, found, strict=True))
    # Only what is the same in any order is unpacked without a transposition, which OpenVINO does not fold.
    packed = PackedWeights(GraphBuilder(), folds_all=False)
    assert packed.add(*weights[0], "w")[1] == (form in ("3 bits", "4 levels"))


@pytest.mark.parametrize("form", OF_EACH_KIND)
def test_onnx_runtime_runs_the_same_integers_on_the_same_kernels(form: str) -> None:
    module, _ = with_integers(FORMS[form])
    packed, plain = (to_onnx(module, options=options).SerializeToString() for options in (None, PLAIN))
    report = kernel_report(packed)
    assert report == kernel_report(plain)
    assert set(report.kernels.values()) == {"QLinearConv", "QGemm"}
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(executable(packed)((x,)), executable(plain)((x,)))
    assert len(packed) < len(plain) or form == "8 bits"


@pytest.mark.parametrize("form", OF_EACH_KIND)
def test_the_file_has_the_bytes_that_are_counted(form: str) -> None:
    module, integers = with_integers(FORMS[form])
    graph = to_onnx(module).graph
    stored = sum(len(t.raw_data) for t in graph.initializer if t.data_type in INTEGERS and t.dims)
    # A stem is stored in blocks of pixels, with zeros around; zero-points and levels of symbols are a few bytes.
    del integers["stem"]
    counted = sum(packed_bytes(q) for q in integers.values())
    stem = packed_bytes(FORMS[form](48, 48, 0))
    assert stored == pytest.approx(counted + stem, rel=0.04, abs=300)


def test_small_weights_of_one_form_share_the_nodes_that_unpack_them() -> None:
    many = [(uniform(3)(32, 90, seed), 0) for seed in range(10)]
    _, one = unpacked(many[:1])
    _, ten = unpacked(many)
    # For each further layer a Reshape, and an output of the one Split.
    assert len(ten.graph.node) - len(one.graph.node) == 9 * 2 + 2
    of_rows = [(row_tables(4)(32, 300, seed), 0) for seed in range(10)]
    _, ten = unpacked(of_rows)
    assert [node.op_type for node in ten.graph.node].count("GatherElements") == 1
    large = [(uniform(3)(300, 300, seed), 0) for seed in range(3)]
    _, three = unpacked(large)
    assert "Split" not in {node.op_type for node in three.graph.node}


def test_equal_weights_are_stored_once() -> None:
    weight = uniform(2)(64, 90, 0)
    _, model = unpacked([(weight, 0), (weight.copy(), 0), (weight.T.copy(), 1)])
    assert sum(len(t.raw_data) for t in model.graph.initializer if t.data_type == TensorProto.UINT8) == 2 * 64 * 90 // 4


def test_layers_are_shown_at_the_width_they_take(tmp_path: Path) -> None:
    widths = {"3 bits": "INT3", "3 levels": "INT1.6", "6 levels": "INT2.67", "4 levels a row": "INT2", "5 bits": "INT5"}
    for form, width in widths.items():
        path = tmp_path / "model.onnx"
        module, _ = with_integers(FORMS[form])
        _ = export_onnx(module, path)
        found = inspect_onnx(path)
        shown = {layer.name: layer.weight for layer in found.layers}
        assert shown["deep"] == width
        assert all(layer.kernel in ("QLinearConv", "QGemm") and layer.reason is None for layer in found.layers)
        assert found.operators["Conv"][f"W{width.removeprefix('INT')}A8"] >= 1
        assert found.notes == ()


def test_what_openvino_would_not_fold_is_stored_in_bytes_and_named(tmp_path: Path) -> None:
    for fill, unfolded in ((mixed, ("tokens",)), (uniform(3), ())):
        module, _ = with_integers(fill)
        for runtime, names in (("openvino", unfolded), ("onnxruntime", ())):
            report = export_onnx(module, tmp_path / "model.onnx", options=OnnxOptions.of({"runtime": runtime}))
            assert report.unpacked == names
