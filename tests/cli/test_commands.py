from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import fxquant
from fxquant.cli import commands as cli
from fxquant.cli import main
from fxquant.core.ir import Choice
from fxquant.outputs import write_outputs
from tests.small import small, small_result

Captured = pytest.CaptureFixture[str]
REFERENCE = ["--target", "reference", "--effort", "fast"]
BUDGET = ["--budget", "average_bits=5"]


def scoring(output: Path, model: str = "small", loader: str = "images") -> list[str]:
    place = "tests.small:"
    model = model if "." in model else place + model
    loader = loader if "/" in loader else place + loader
    return ["--model", model, "--calibration", loader, "--output", str(output), *REFERENCE]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    write_outputs(small_result("onnxruntime"), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "result"
    shutil.copytree(saved, copy)
    return copy


def files(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def failure(arguments: list[str], code: int, capsys: Captured) -> str:
    """Run a command that must fail and return its last line on stderr, behind those of stages and attempts."""
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    *stages, last = printed.err.splitlines()
    assert last.startswith("fxquant: error: ")
    assert all(
        re.search(r"^\d+ of \d+: |: \d+ of \d+ in |cells, |candidates, |are candidates too$", line) for line in stages
    ), stages
    return last


def test_quantize_writes_everything_and_prints_the_summary(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "new" / "out"
    arguments = ["quantize", *scoring(out), *BUDGET, "--target", "onnxruntime", "--pin", "st*=W8A8"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "3 of 3 layers quantized" in printed.out
    assert str(out / "model.onnx") in printed.out
    # No terminal watches: a line for each stage.
    assert re.search(r"^calibrate: \d+ of \d+ in [\d.]+ s$", printed.err, re.MULTILINE)
    assert {"plan.json", "model.onnx", "report.html", "report.json", "result.json", "scores"} <= set(files(out))
    result = fxquant.load(out)
    assert result.allocation.choices["stem"] == Choice(8, 8)
    measured = json.loads((out / "report.json").read_text())["measured"]
    assert measured["bytes_on_disk"] == (out / "model.onnx").stat().st_size
    assert set(measured["kernels"]) == {"stem", "body", "head"}
    # An earlier result is not overwritten unasked; --resume takes its scores.
    assert "give --resume" in failure(arguments, 2, capsys)
    assert main([*arguments, "--resume", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_analyze_then_allocate(tmp_path: Path, capsys: Captured) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    assert main(["analyze", *scoring(out), "--quiet"]) == 0
    assert fxquant.load(out).allocation.status == "manual"
    before = (out / "plan.json").read_bytes()
    assert main(["allocate", str(out), *BUDGET, "--output", str(other)]) == 0
    assert "Budget average_bits" in capsys.readouterr().out
    assert (out / "plan.json").read_bytes() == before
    assert fxquant.load(other).allocation.used["average_bits"] <= 5.0
    assert main(["allocate", str(out), *BUDGET, "--quiet"]) == 0
    assert fxquant.load(out).allocation.choices == fxquant.load(other).allocation.choices
    assert "model.onnx" not in files(out)


def test_allocate_out_of_reach_leaves_the_result_as_it_was(folder: Path, capsys: Captured) -> None:
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    assert "reachable" in failure(["allocate", str(folder), "--budget", "size_ratio=0.01"], 3, capsys)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def edited(folder: Path, path: Path, **choices: str) -> str:
    """Write the plan of a result with other choices."""
    document = json.loads((folder / "plan.json").read_text())
    document["choices"] |= choices
    path.write_text(json.dumps(document))
    return str(path)


def test_export_takes_the_choices_of_a_file(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "apart.onnx"
    assert main(["export", str(folder), "--output", str(path), "--external-data", "--runtime", "openvino"]) == 0
    weights = tmp_path / "apart.onnx.data"
    # Weights as small as this network's stay in the graph, and the file beside it is empty.
    assert weights.is_file()
    assert f"{path.stat().st_size + weights.stat().st_size} bytes" in capsys.readouterr().out
    command = ["export", str(folder), "--output", str(path), "--weight-only", "nose"]
    assert "weight_only='nose' names no linear layer" in failure(command, 2, capsys)


def test_export_with_an_edited_plan(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    plan = edited(folder, tmp_path / "edited.json", stem="W2A8", body="W2A8", head="W2A8")
    path = tmp_path / "deep" / "edited.onnx"
    assert main(["export", str(folder), "--plan", plan, "--output", str(path)]) == 0
    assert "3 of 3 layers on integer kernels" in capsys.readouterr().out
    assert path.stat().st_size > 0
    plan = edited(folder, tmp_path / "edited.json", stem="W3A8")
    assert "'stem' W3A8, which was not measured" in failure(["export", str(folder), "--plan", plan], 2, capsys)


def test_a_plan_edited_in_place_loses_the_solvers_claims(folder: Path) -> None:
    edited(folder, folder / "plan.json", stem="W2A8")
    assert main(["report", str(folder), "--quiet"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["outcome"]["status"] == "manual"
    # What was measured on the earlier plan does not hold for this one.
    assert report["measured"] == {}


@pytest.mark.slow
def test_bench_and_report_keep_what_was_measured(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["bench", str(folder), "--rounds", "2", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "float" in printed
    assert "mixed" in printed
    other = tmp_path / "page"
    assert main(["report", str(folder), "--output", str(other)]) == 0
    assert files(other) == ["report.html", "report.json"]
    assert "wrote" in capsys.readouterr().out
    measured = json.loads((other / "report.json").read_text())["measured"]
    assert [row["name"] for row in measured["comparison"]] == ["float", "mixed", "uniform W4A8", "uniform W8A8"]
    assert measured["bytes_on_disk"] > 0
    assert "1 thread" in measured["runtime"]
    assert "out of range" in failure(["bench", str(folder), "--rounds", "1"], 2, capsys)


def test_corrupt_files_are_bad_input(folder: Path, capsys: Captured) -> None:
    spoilt = {
        "plan.json": b'{"kind": "plan", "version": 1}',
        "result.json": b"{",
        "model.pt2": b"PK",
        "ranges.npz": b"",
        "sensitivity_fisher_out.npz": b"no",
        "held_out.safetensors": b"\xff" * 40,
    }
    for name, garbage in spoilt.items():
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(garbage)
        assert name in failure(["report", str(folder)], 2, capsys)
        (folder / name).write_bytes(whole)
    assert "not a folder" in failure(["report", str(folder / "nowhere")], 2, capsys)


@pytest.mark.parametrize(
    ("model", "loader", "message"),
    [
        ("branching", "images", "does not export"),
        ("not_finite", "images", "'body.weight' holds 216 values that are NaN"),
        ("no_model", "images", "gives a int"),
        ("failing", "images", "RuntimeError: checkpoint is gone"),
        ("absent", "images", "tests.small has no 'absent'"),
        ("nowhere.at:all", "images", "importing nowhere.at failed"),
        ("nowhere.pt2", "images", "no such file"),
        ("small", "no_images", "holds no images"),
        ("small", "one_image", "holds one image"),
        ("small", "nan_images", "NaN or infinity, first in image 24"),
        ("small", "wrong_shape", "does not run on inputs of shape"),
        ("small", "failing_loader", "disk went away"),
        ("small", "/nowhere.npz", "no such file"),
        ("small", "/nowhere.npy", "not a readable npy"),
        ("small", "/nowhere", "neither .npz, .npy, an existing folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    model: str, loader: str, message: str, tmp_path: Path, capsys: Captured
) -> None:
    arguments = ["quantize", *scoring(tmp_path / "a" / "out", model, loader), *BUDGET]
    assert message in failure(arguments, 2, capsys)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--budget", "average_bits=1"], 3, "reachable: 1."),
        (["--budget", "bits=1"], 2, "unknown budget 'bits'"),
        (["--budget", "size_mb=-1"], 2, "above 0"),
        ([*BUDGET, "--bits", "2,x"], 2, "write bits and a kind"),
        ([*BUDGET, "--bits", "9"], 2, "are out of range"),
        ([*BUDGET, "--pin", "nothing*=W8A8"], 2, "matches no site"),
        ([*BUDGET, "--keep-float", "*"], 2, "no layer can be quantized"),
        ([*BUDGET, "--target", "tpu"], 2, "unknown target 'tpu'; known: reference"),
        ([*BUDGET, "--loss", "l7"], 2, "l7"),
        ([*BUDGET, "--observer", "eye"], 2, "eye"),
        ([*BUDGET, "--mean", "0,0"], 2, "1 or 3 channels"),
    ],
)
def test_bad_options_leave_nothing(more: list[str], code: int, message: str, tmp_path: Path, capsys: Captured) -> None:
    arguments = ["quantize", *scoring(tmp_path / "out"), *more]
    assert message in failure(arguments, code, capsys)
    assert files(tmp_path) == []


def test_missing_arguments_and_commands(capsys: Captured) -> None:
    assert "required: command" in failure([], 2, capsys)
    assert "required: --budget" in failure(["quantize"], 2, capsys)
    assert "invalid choice" in failure(["quantise"], 2, capsys)


def test_help_names_every_command(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in cli.COMMANDS)


def test_unwritable_output_is_found_before_the_work(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "file").write_text("")
    message = failure(["quantize", *scoring(tmp_path / "file" / "out", model="failing"), *BUDGET], 1, capsys)
    assert "cannot write" in message
    assert files(tmp_path) == ["file"]


def test_failure_at_the_end_keeps_scores_but_no_half_result(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    arguments = ["quantize", *scoring(tmp_path), *BUDGET]
    with monkeypatch.context() as patch:
        patch.setattr("fxquant.report.html.render", full)
        assert "No space left" in failure(arguments, 1, capsys)
    assert {name.split("/")[0] for name in files(tmp_path)} == {"scores"}
    assert main([*arguments, "--resume", "--quiet"]) == 0


def test_interrupt_and_unexpected_failure(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: object) -> None:
        raise KeyboardInterrupt

    def broken(_: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setitem(cli.COMMANDS, "report", stopped)
    assert main(["report", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "fxquant: stopped; what was there before is as it was\n"
    for command in ("analyze", "reconstruct"):
        monkeypatch.setitem(cli.COMMANDS, command, stopped)
    assert main(["analyze", *scoring(tmp_path)]) == 130
    assert capsys.readouterr().err == "fxquant: stopped; nothing was finished yet\n"
    (tmp_path / "scores").mkdir()
    for name in ("a.npz", ".unfinished-b.npz", "identity.json"):
        (tmp_path / "scores" / name).touch()
    assert main(["analyze", *scoring(tmp_path)]) == 130
    message = f"fxquant: stopped; 1 finished parts are kept in {tmp_path}: --resume goes on from there\n"
    assert capsys.readouterr().err == message
    (tmp_path / "rounding" / "deep").mkdir(parents=True)
    (tmp_path / "rounding" / "deep" / "unit.npz").touch()
    assert main(["reconstruct", str(tmp_path), "--calibration", "tests.small:images"]) == 130
    assert "2 finished parts are kept" in (err := capsys.readouterr().err)
    assert "the same command goes on" in err
    monkeypatch.setitem(cli.COMMANDS, "report", broken)
    assert "unexpected ZeroDivisionError: a b (--debug" in failure(["report", str(tmp_path)], 1, capsys)
    assert main(["report", str(tmp_path), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_pt2_model_and_npz_images(tmp_path: Path) -> None:
    images = torch.randn(12, 1, 8, 8)
    exported = torch.export.export(small(), (images[:2],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(exported, tmp_path / "net.pt2")
    np.savez(tmp_path / "images.npz", allow_pickle=False, x=images.numpy(), y=np.zeros(12, dtype=np.int64))
    arguments = scoring(tmp_path / "out", str(tmp_path / "net.pt2"), str(tmp_path / "images.npz"))
    assert main(["quantize", *arguments, *BUDGET, "--loss", "ce", "--quiet"]) == 0
    assert len(fxquant.load(tmp_path / "out").allocation.choices) == 3


def test_plans_are_judged_by_a_function(tmp_path: Path, capsys: Captured) -> None:
    source = tmp_path / "judge.py"
    source.write_text("def worst(a, b, labels):\n    return (a - b).abs().amax(1)\nnumber = 3\n")
    loss, place = ["--loss", f"{source}:worst"], tmp_path / "out"
    assert main(["quantize", *scoring(place), *BUDGET, *loss, "--quiet"]) == 0
    assert json.loads((place / "plan.json").read_text())["loss"] == "function judge.worst"
    assert "function judge.worst, which a file cannot hold" in failure(["allocate", str(place), *BUDGET], 2, capsys)
    assert main(["allocate", str(place), *BUDGET, *loss, "--quiet"]) == 0
    wrong = ["quantize", *scoring(tmp_path / "b"), *BUDGET, "--loss"]
    assert "gives a int, not a function" in failure([*wrong, f"{source}:number"], 2, capsys)
    assert "unknown loss 'msr' (did you mean 'mse'?)" in failure([*wrong, "msr"], 2, capsys)
