"""Files of ours, of others, and damaged ones."""

from __future__ import annotations

import math
import random
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from fxquant.backends.onnx import Inspection, Origins, Stored, inspect_onnx, type_name
from fxquant.core.errors import FileFormatError, OptionError
from tests.backends.foreign import branching_net, external_net, float_net, integer_net, model, quantized_net, stored
from tests.small import small_result


def inspected(made: onnx.ModelProto, folder: Path, runtime: bool = True) -> Inspection:
    path = folder / "net.onnx"
    path.write_bytes(made.SerializeToString())
    return inspect_onnx(path, runtime)


def test_our_own_file(tmp_path: Path) -> None:
    result = small_result("onnxruntime")
    path = tmp_path / "own.onnx"
    written = result.to_onnx(path)
    found = inspect_onnx(path)
    assert found.bytes == written.bytes
    assert found.opsets == {"ai.onnx": written.opset}
    assert {name: sum(counts.values()) for name, counts in found.operators.items()} == written.nodes
    choices = result.allocation.choices
    assert {layer.name: layer.weight for layer in found.layers} == {
        name: f"INT{choice.weight_bits}" for name, choice in choices.items()
    }
    assert [layer.kernel for layer in found.layers] == ["QLinearConv", "QLinearConv", "QGemm"]
    assert all(layer.reason is None and layer.activation == "UINT8" for layer in found.layers)
    assert "fxquant_plan" in found.metadata
    assert found.notes == ()
    assert found.inputs[0].shape == ("batch", "1", "8", "8")
    assert [value.name for value in found.outputs] == ["output"]


def test_a_float_model_of_somebody_else(tmp_path: Path) -> None:
    found = inspected(float_net(), tmp_path)
    assert found.producer == "somebody"
    # Two layers of one name are two layers; a product of two activations has no weight.
    assert [(layer.name, layer.kernel, layer.reason) for layer in found.layers] == [
        ("same", "float", "its weights are FLOAT")
    ] * 2
    assert found.operators == {"Conv": {"float": 2}, "MatMul": {"other": 1}}
    assert found.stored == {"FLOAT": Stored(1, 4, 16)}
    assert found.outputs[0].shape == ("batch", "2", "4", "4")


@pytest.mark.parametrize(
    ("made", "precision", "kernel", "reason"),
    [
        (quantized_net(), "W8A8", "QLinearConv", None),
        (quantized_net(TensorProto.INT4, cast=True), "W4A8", "QLinearConv", None),
        (quantized_net(TensorProto.INT4), "W4A8", "float", "a Cast to INT8 before DequantizeLinear gives them"),
        (quantized_net(input_quantized=False), "W8A32", "float", "its input is not quantized"),
        (quantized_net(output_quantized=False), "W8A8", "float", "its output is not quantized"),
        (quantized_net(operator="ConvTranspose"), "W8A8", "float", "no integer ConvTranspose"),
    ],
    ids=["int8", "int4 cast", "int4", "input", "output", "transposed"],
)
def test_why_a_quantized_layer_runs_in_float(
    made: onnx.ModelProto, precision: str, kernel: str, reason: str | None, tmp_path: Path
) -> None:
    found = inspected(made, tmp_path)
    (layer,) = found.layers
    assert found.operators[layer.operator] == {precision: 1}
    assert layer.kernel == kernel, found.notes
    assert (layer.reason is None) if reason is None else reason in (layer.reason or "")
    # The same is seen without asking the runtime.
    (read,) = inspected(made, tmp_path, runtime=False).layers
    assert read.kernel is None
    assert read.reason == layer.reason


def test_float_weights_between_quantizers_are_float(tmp_path: Path) -> None:
    made = quantized_net()
    conv = next(node for node in made.graph.node if node.op_type == "Conv")
    conv.input[1] = "plain"
    made.graph.initializer.append(stored("plain", [[[[1.0]], [[1.0]]]] * 2))
    found = inspected(made, tmp_path, runtime=False)
    assert found.operators["Conv"] == {"float": 1}
    assert [(layer.activation, layer.reason) for layer in found.layers] == [("UINT8", "its weights are FLOAT")]


def test_what_only_the_runtime_knows(tmp_path: Path) -> None:
    # A grid that reaches below zero cannot do the clip's work, so the clip stays between convolution and quantizer.
    made = quantized_net(zero_point=3)
    (layer,) = inspected(made, tmp_path).layers
    assert (layer.kernel, layer.reason) == ("float", "ONNX Runtime made no integer kernel of it")
    assert inspected(made, tmp_path, runtime=False).layers[0].reason is None


def test_integers_in_the_operator_itself(tmp_path: Path) -> None:
    found = inspected(integer_net(), tmp_path)
    assert [(layer.name, layer.weight, layer.kernel) for layer in found.layers] == [("conv", "INT8", "QLinearConv")]
    assert found.operators["QLinearConv"] == {"integer": 1}
    assert found.operators["QuantizeLinear"] == {"conversion": 1}


def test_branches_are_counted_and_read_the_outer_weights(tmp_path: Path) -> None:
    found = inspected(branching_net(), tmp_path)
    assert found.operators["Conv"] == {"float": 2}
    assert sorted(layer.name for layer in found.layers) == ["no", "yes"]
    assert {layer.reason for layer in found.layers} == {"its weights are FLOAT"}


def test_external_weights_are_counted_not_read(tmp_path: Path) -> None:
    path = external_net(tmp_path)
    (tmp_path / "weights.bin").unlink()
    found = inspect_onnx(path)
    assert found.stored == {"FLOAT": Stored(1, 4, 16)}
    assert "'weights.bin'" in found.notes[0]
    assert "was not asked" in found.notes[1]
    assert [layer.reason for layer in found.layers] == ["its weights are FLOAT"] * 2


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_bytes_are_those_of_the_file(bits: int, tmp_path: Path) -> None:
    kind = {2: TensorProto.INT2, 4: TensorProto.INT4}[bits]
    made = model([onnx.helper.make_node("Identity", ["x"], ["y"])], [stored("odd", [1] * 7, kind)], opset=25)
    count = inspected(made, tmp_path).stored[f"INT{bits}"]
    assert count == Stored(1, 7, math.ceil(7 * bits / 8))
    assert count.bytes in (len(made.graph.initializer[0].raw_data), len(made.graph.initializer[0].int32_data))


def test_what_does_not_fit_is_noted(tmp_path: Path) -> None:
    made = float_net()
    made.graph.initializer[0].ClearField("float_data")
    made.graph.initializer[0].raw_data = b"123"
    made.graph.initializer.add(name="negative", data_type=1, dims=[-3])
    found = inspected(made, tmp_path)
    assert found.notes[0] == "initializer 'w' holds 3 bytes where its shape needs 16"
    assert found.notes[1].startswith("initializer 'negative' has a negative size")
    assert "ONNX Runtime" in found.notes[2]
    assert [layer.kernel for layer in found.layers] == [None, None]


def test_an_operator_that_nobody_knows(tmp_path: Path) -> None:
    made = float_net()
    made.graph.node[2].op_type = "Magic"
    made.graph.node[2].domain = "nowhere.org"
    made.opset_import.add(domain="nowhere.org", version=3)
    found = inspected(made, tmp_path)
    assert found.opsets == {"ai.onnx": 21, "nowhere.org": 3}
    assert found.operators["Magic"] == {"other": 1}
    assert any("ONNX Runtime could not be asked" in note for note in found.notes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\x00" * 64, "not an intact"),
        (b"# a page", "not an intact"),
        (b"\x08\x0a", "holds no graph"),
    ],
)
def test_what_is_no_model(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=message):
        inspect_onnx(path)


def test_missing_folder_and_too_large(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        inspect_onnx(tmp_path / "nowhere.onnx")
    with pytest.raises(FileFormatError, match="no plain file"):
        inspect_onnx(tmp_path)
    sparse = tmp_path / "huge.onnx"
    with sparse.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(FileFormatError, match="at most 2147483647"):
        inspect_onnx(sparse)
    with pytest.raises(OptionError, match="empty file"):
        Inspection(0, 1, {}, "", (), (), {}, {}, (), {}, ())


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    whole = quantized_net().SerializeToString()
    random_of = random.Random(0)
    path = tmp_path / "net.onnx"
    refused: list[str] = []
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(random_of.randint(1, 8)):
            data[random_of.randrange(len(data))] = random_of.randrange(256)
        path.write_bytes(bytes(data[: random_of.choice([len(data), random_of.randrange(1, len(data))])]))
        try:
            inspect_onnx(path, runtime=False)
        except FileFormatError as error:
            refused.append(str(error))
    assert 30 < len(refused) < 300
    assert not any("\n" in message for message in refused)


def test_a_circle_ends() -> None:
    nodes = [onnx.helper.make_node("Identity", [a], [b]) for a, b in (("p", "q"), ("q", "p"))]
    assert Origins(nodes).of("p").stored is None
    assert type_name(99) == "type 99"
