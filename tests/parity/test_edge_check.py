from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule

from benchmarks.data import data_folder
from benchmarks.zoo import NETWORKS
from fxquant import flow
from fxquant.api import capture, prepare
from fxquant.backends.int8 import FxInt8Backend, traced_forms
from fxquant.backends.onnx import to_onnx
from fxquant.cli import main
from fxquant.core.errors import FileFormatError, OptionError, ParityError
from fxquant.core.facts import BitAllocation, Settings
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import CalibrationSet
from fxquant.outputs import write_outputs
from fxquant.parity import AGREEMENT, Pair, Parity, as_json, check, compare
from fxquant.passes import simulate, widest_plan
from tests.backends.lowered import QUANTIZED, example, simulated
from tests.models import MODELS, Composed, built
from tests.small import images, small_result

FX_INT8 = Settings(bits=(8,), target="fx_int8")
EAGER = ("onnxruntime", "fx_int8")


def pair(**values: Any) -> Pair:
    return replace(Pair("exact", "onnxruntime", 1.0, 0.0, 0.0, 0.0, None, None, None, 3, True), **values)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("widths", [(8,), (4, 8, 2)])
def test_every_small_network_keeps_the_limits_in_every_runtime(name: str, widths: tuple[int, ...]) -> None:
    found = compare(simulated(name, widths), CalibrationSet(example(name, 6)), EAGER, threads=1)
    assert found.within, found.summary()
    assert [(p.reference, p.runtime) for p in found.pairs] == [
        (reference, runtime) for runtime in EAGER for reference in ("exact", "simulated")
    ]
    assert all(p.edges > 0 for p in found.pairs)


def with_a_fault(model: bytes, layer: str) -> bytes:
    """Return the file with the scales of one layer's weight 10 % too large."""
    damaged = onnx.load_model_from_string(model)
    made = {node.output[0]: node for node in damaged.graph.node}
    (node,) = (node for node in damaged.graph.node if node.name == layer)
    (scales,) = (t for t in damaged.graph.initializer if t.name == made[node.input[1]].input[1])
    wrong = numpy_helper.to_array(scales) * np.float32(1.1)
    scales.CopyFrom(numpy_helper.from_array(wrong, scales.name))
    data: bytes = damaged.SerializeToString()
    return data


def layers(model: bytes) -> list[str]:
    return [node.name for node in onnx.load_model_from_string(model).graph.node if node.name]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_wrong_scale_is_found_and_its_layer_named(position: int) -> None:
    result = small_result("onnxruntime")
    model = to_onnx(result.simulated).SerializeToString()
    layer = layers(model)[position]
    found = compare(
        result.simulated, CalibrationSet((images(),)), ("onnxruntime",), {".onnx": with_a_fault(model, layer)}
    )
    exact, simulation = found.pairs
    assert not found.within
    last = exact.broken == "output"
    for seen in (exact, simulation):
        assert seen.broken is not None
        assert seen.broken.startswith(f"{layer} (") or (last and seen.broken == "output")
        assert seen.layer_step > 1
    assert last == (layer == layers(model)[-1])
    with pytest.raises(
        ParityError, match=f"does not compute what the plan says: {re.escape(str(exact.broken))} differs"
    ):
        found.require()


@cache
def two_answers() -> GraphModule:
    """Return a graph of a layer called twice, a second answer by another layer, and a third that never varies."""

    def answer(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(m.conv(torch.relu(m.conv(x)))).flatten(1)
        return m.head(x), m.other(x), torch.softmax(m.head(x)[:, :1], dim=1) + 0.7

    torch.manual_seed(0)
    conv, head, other = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(64, 3), nn.Linear(64, 4)
    model = Composed(answer, conv=conv, head=head, other=other)
    shown = CalibrationSet((images(),))
    program = flow.calibrate(prepare(capture(model, shown), Settings(bits=(8,))), shown)
    return simulate(program, widest_plan(program)).module


def test_every_answer_is_compared() -> None:
    shown, module = CalibrationSet((images(8),)), two_answers()
    assert compare(module, shown).within
    model = with_a_fault(to_onnx(module).SerializeToString(), "other")
    broken = compare(module, shown, ("onnxruntime",), {".onnx": model})
    assert [pair.broken for pair in broken.pairs] == ["output 1", "output 1"]


def test_an_edge_is_not_hidden_by_another_of_its_name() -> None:
    module = two_answers()
    damaged = to_onnx(module)
    second = [node for node in damaged.graph.node if node.op_type == "QuantizeLinear"][1]
    (scale,) = (t for t in damaged.graph.initializer if t.name == second.input[1])
    damaged.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.2), "wrong"))
    second.input[1] = "wrong"
    found = compare(module, CalibrationSet((images(8),)), ("onnxruntime",), {".onnx": damaged.SerializeToString()})
    assert found.pairs[0].broken == "conv (conv + relu)"


def test_a_result_is_checked_with_its_own_images_and_with_others(tmp_path: Path) -> None:
    result = small_result("onnxruntime")
    own = check(result, against=("fx_int8",))
    assert result.held_out is not None
    assert own.images == len(result.held_out)
    assert own.accuracy == {}
    labelled = check(result, [(images(10), torch.zeros(10, dtype=torch.long))], ("fx_int8",), limit=6)
    assert labelled.images == 6
    assert set(labelled.accuracy) == {"simulated", "exact fx_int8", "fx_int8"}
    labelled.require()
    with pytest.raises(OptionError, match="at least one image"):
        check(result, limit=0)
    with pytest.raises(OptionError, match="carries no images"):
        check(replace(result, held_out=None))
    with pytest.raises(OptionError, match="unknown runtime tpu; known: onnxruntime"):
        check(result, against=("tpu",))
    with pytest.raises(FileFormatError, match="No such file"):
        check(result, model=tmp_path / "none.onnx")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_compiled_graph_computes_the_same_integers_in_every_form() -> None:
    images = CalibrationSet(MODELS["inverted"].inputs(16))
    program = prepare(capture(built("inverted"), images), FX_INT8)
    program = flow.calibrate(program, images)
    module = simulate(program, widest_plan(program)).module
    forms = traced_forms(FxInt8Backend().lower(module, 32))
    assert {"rows", "shifted", "call", "sum behind"} <= set(forms.values())
    found = compare(module, images, ("compiled",))
    exact, _ = found.pairs
    assert found.within, found.summary()
    assert (exact.runtime, exact.first) == ("compiled", None), exact
    assert exact.edges > 4


def test_what_was_found_is_written_as_table_and_as_json() -> None:
    found = check(small_result("onnxruntime"), limit=4)
    document = json.loads(as_json(found))
    assert document["kind"] == "parity"
    assert document["within"] is True
    assert document["limits"] == {"layer_step": 1, "agreement": AGREEMENT}
    assert [row["runtime"] for row in document["pairs"]] == ["onnxruntime", "onnxruntime", "fx_int8", "fx_int8"]
    lines = found.summary().splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert sum("exact" in line for line in lines) == 2


def test_limits_that_are_not_kept_are_reported() -> None:
    drifted = Parity(200, 5, (pair(agreement=0.9, within=False, first="a (conv)"),), {})
    with pytest.raises(ParityError, match=r"10\.0% of 200 images, 0\.5% is allowed; they diverge first at a \(conv\)"):
        drifted.require()
    long = pair(first=f"{'features.12.' * 4}expand3x3 (conv + relu)", mean_step=0.01234, layer_step=4.5e-05)
    lines = replace(drifted, pairs=(*drifted.pairs, long)).summary().splitlines()
    assert lines[3].endswith("WRONG")
    assert "expand3x3 (conv + relu) " in lines[4]
    assert lines[4].endswith(" ok")
    assert all(len(line) <= 100 for line in lines)
    with pytest.raises(OptionError, match="nothing was compared"):
        Parity(0, 5, (pair(),), {})
    with pytest.raises(OptionError, match="0 or more"):
        pair(mean_step=-1.0)


def test_a_file_without_the_plans_edges_is_compared_by_its_output() -> None:
    result = small_result("onnxruntime")
    model = onnx.load_model_from_string(to_onnx(result.simulated).SerializeToString())
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = f"renamed{name[1:]}" if re.fullmatch(r"q\d+", name) else name
    found = compare(
        result.simulated, CalibrationSet((images(8),)), ("onnxruntime",), {".onnx": model.SerializeToString()}
    )
    assert found.within
    assert found.pairs[0].edges == 0
    assert "0 of" in found.summary()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "result"
    write_outputs(small_result("onnxruntime"), folder)
    assert main(["check", str(folder), "--against", "onnxruntime", "--images", "4"]) == 0
    assert "exact" in capsys.readouterr().out
    assert main(["check", str(folder), "--data", "tests.small:images", "--json", "--against", "fx_int8"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 24
    seen = json.loads((folder / "report.json").read_text())["measured"]
    assert seen["check"]["images"] == 24
    assert [pair["runtime"] for pair in seen["check"]["pairs"]] == ["fx_int8", "fx_int8"]
    assert seen["kernels"], "what was known before stays"
    assert "Parity of computations" in (folder / "report.html").read_text()
    path = folder / "model.onnx"
    model = path.read_bytes()
    path.write_bytes(with_a_fault(model, layers(model)[1]))
    assert main(["check", str(folder), "--quiet"]) == 4
    seen = capsys.readouterr()
    assert seen.out == ""
    assert layers(model)[1] in seen.err
    assert not json.loads((folder / "report.json").read_text())["measured"]["check"]["within"]
    assert main(["check", str(folder), "--onnx", str(folder / "none.onnx")]) == 2
    assert main(["check", str(folder), "--data", "nothing"]) == 2
    assert "--data nothing is neither" in capsys.readouterr().err


@cache
def calibrated(name: str, target: str) -> Program:
    """Return a real network, calibrated for uniform plans."""
    network = NETWORKS[name]
    calibration = CalibrationSet((network.calibration(8 if name == "resnet20" else 2),))
    program = prepare(capture(network.factory(), calibration), Settings(bits=(4, 8), target=target))
    return flow.calibrate(program, calibration)


def real(name: str, bits: int, target: str) -> tuple[GraphModule, CalibrationSet]:
    """Return the simulated graph of a real network at uniform width, and labelled images."""
    program = calibrated(name, target)
    plan = BitAllocation({site.name: Choice(bits, 8) for site in program[Sites].sites})
    shown, labels = NETWORKS[name].evaluation(32 if name == "resnet20" else 2)
    return simulate(program, plan).module, CalibrationSet((shown,), labels)


@pytest.mark.slow
@pytest.mark.skipif(data_folder() is None, reason="set FXQUANT_DATA to run the real networks")
@pytest.mark.parametrize(
    ("name", "bits", "against"),
    [
        ("resnet20", 4, EAGER),
        ("resnet20", 8, ("fx_int8",)),
        ("mobilenet_v2", 8, EAGER),
        ("squeezenet", 4, EAGER),
        ("dscnn", 8, EAGER),
    ],
)
def test_runtimes_compute_what_their_exact_references_do(name: str, bits: int, against: Sequence[str]) -> None:
    # A plan for PyTorch may leave the rounding in front of a sum out: the convolution adds the other operand itself.
    module, shown = real(name, bits, against[0])
    found = compare(module, shown, against, threads=1)
    assert found.within, found.summary()
    for seen in found.pairs:
        if seen.reference == "exact":
            # Every integer is the same; logits that are float differ by their own rounding.
            assert seen.first is None, found.summary()
            assert seen.layer_step < 1e-3, found.summary()
            assert seen.max_step < 1e-3, found.summary()
            assert seen.agreement == 1.0, found.summary()
