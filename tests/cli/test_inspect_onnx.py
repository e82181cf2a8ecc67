from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from fxquant.cli import SHOWN, as_text, inspect, main
from tests.backends.foreign import float_net, model, quantized_net, stored
from tests.small import small_result

Captured = pytest.CaptureFixture[str]
HOSTILE = "\x1b[2J\u202econv\n<script>\x07"


def write(made: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def clean(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text)


def test_our_own_file_on_the_terminal(tmp_path: Path, capsys: Captured) -> None:
    result = small_result("onnxruntime")
    path = tmp_path / "own.onnx"
    result.to_onnx(path)
    assert main(["inspect", str(path)]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert "3 of 3 layers with weights in integers: 1 by QGemm, 2 by QLinearConv" in printed
    assert "plan of 3 layers: " in printed
    assert "input x: FLOAT batch x 1 x 8 x 8" in printed
    assert "producer: fxquant" in printed
    assert "in float" not in printed
    assert max(map(len, printed.splitlines()[1:])) <= 100


def test_json_holds_everything(tmp_path: Path, capsys: Captured) -> None:
    result = small_result("onnxruntime")
    path = tmp_path / "own.onnx"
    result.to_onnx(path)
    assert main(["inspect", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["version"]) == ("inspection", 1)
    assert document["plan"] == {name: choice.label for name, choice in result.allocation.choices.items()}
    assert [layer["kernel"] for layer in document["layers"]] == ["QLinearConv", "QLinearConv", "QGemm"]
    assert document["stored"]["FLOAT"]["bytes"] == 4 * document["stored"]["FLOAT"]["elements"]
    assert document["notes"] == []


def test_layers_in_float_come_with_the_reason(tmp_path: Path, capsys: Captured) -> None:
    path = write(quantized_net(input_quantized=False), tmp_path)
    assert main(["inspect", str(path), "--no-runtime"]) == 0
    printed = capsys.readouterr().out
    assert "0 of 1 layers with weights in integers" in printed
    assert "  Conv 1 (Conv): its input is not quantized" in printed
    assert main(["inspect", str(write(quantized_net(), tmp_path)), "--no-runtime"]) == 0
    assert (
        "0 of 1 layers with weights in integers\n1 quantized in the file; ONNX Runtime was not"
        in capsys.readouterr().out
    )


def test_names_cannot_rewrite_the_terminal(tmp_path: Path, capsys: Captured) -> None:
    made = float_net()
    made.producer_name = made.graph.input[0].name = HOSTILE
    for node in made.graph.node:
        node.name = HOSTILE
        node.input[:] = [HOSTILE if name == "x" else name for name in node.input]
    made.graph.node[2].op_type = HOSTILE
    made.graph.initializer[0].dims[0] = 7
    made.graph.initializer[0].raw_data = b"1"
    made.metadata_props.add(key=HOSTILE, value=HOSTILE * 1000)
    made.metadata_props.add(key="fxquant_plan", value=json.dumps({HOSTILE: "W4A8"}))
    made.opset_import.add(domain=HOSTILE, version=1)
    path = write(made, tmp_path)
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert clean(printed)
    assert "plan of 1 layers: 1 x W4A8" in printed
    assert max(map(len, printed.splitlines())) <= 400
    assert main(["inspect", str(path), "--json"]) == 0
    raw = capsys.readouterr().out
    assert clean(raw)
    assert raw.isascii()
    assert json.loads(raw)["inputs"][0]["name"] == HOSTILE
    assert main(["inspect", str(tmp_path / f"{HOSTILE}.onnx")]) == 2
    assert clean(capsys.readouterr().err)


@pytest.mark.parametrize("plan", ["{", "[]", '{"a": 3}', "{}", "[" * 100_000])
def test_a_damaged_plan_is_noted(plan: str, tmp_path: Path) -> None:
    made = float_net()
    made.metadata_props.add(key="fxquant_plan", value=plan)
    document = inspect(write(made, tmp_path), runtime=False)
    assert document["plan"] is None
    assert "the plan in the file cannot be read" in document["notes"][-1]
    assert "metadata fxquant_plan: " in as_text(document)


def test_long_lists_are_cut(tmp_path: Path) -> None:
    names = [f"v{k}" for k in range(SHOWN + 6)]
    nodes = [onnx.helper.make_node("Conv", [a, "w"], [b]) for a, b in zip(["x", *names], [*names, "y"], strict=True)]
    printed = as_text(inspect(write(model(nodes, [stored("w", [[[[1.0]]]])]), tmp_path), runtime=False))
    assert f"in float ({SHOWN + 7}):" in printed
    assert "... and 7 more; --json has all" in printed
    assert len(printed.splitlines()) < SHOWN + 20


def test_nothing_but_activations(tmp_path: Path) -> None:
    printed = as_text(inspect(write(model([onnx.helper.make_node("Relu", ["x"], ["y"])], []), tmp_path)))
    assert "no operator with a weight" in printed
    assert "stored as" not in printed


@pytest.mark.parametrize("data", [b"", b"garbage", quantized_net().SerializeToString()[:90]])
def test_what_is_no_model_is_one_line(data: bytes, tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    assert main(["inspect", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"fxquant: error: {path} ")
    assert printed.err.count("\n") == 1
