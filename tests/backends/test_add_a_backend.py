"""The page on backends, carried out: one file and one line, and every command knows the backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant.cli import main
from fxquant.outputs import write_outputs
from tests.backends.page import run_page
from tests.small import images

LAYERS = {"stem": "my_conv", "body": "my_conv", "head": "my_linear"}


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return run_page(monkeypatch)


def test_every_command_knows_a_backend_added_as_the_page_says(
    page: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, folder = page["result"], tmp_path / "result"
    names = [path.name for path in write_outputs(result, folder)]
    assert names == ["plan.json", "model.mine", "report.html", "report.json"]
    report = json.loads((folder / "report.json").read_text())
    assert {row["name"]: row["kernel"] for row in report["layers"]} == LAYERS
    assert report["measured"]["bytes_on_disk"] == (folder / "model.mine").stat().st_size
    assert report["asked"]["settings"]["target"] == "mine"

    again = fxquant.load(folder)
    assert torch.equal(again.lowered(images(3)), result.lowered(images(3)))
    assert torch.equal(fxquant.lower(again)(images(3)), page["logits"])

    assert main(["check", str(folder), "--json", "--against", "mine"]) == 0
    assert {pair["runtime"] for pair in json.loads(capsys.readouterr().out)["pairs"]} == {"mine"}
    assert main(["export", str(folder), "--output", str(tmp_path / "model.mine")]) == 0
    assert "3 of 3 layers on integer kernels" in capsys.readouterr().out
    assert (tmp_path / "model.mine").read_bytes() == (folder / "model.mine").read_bytes()
    assert main(["export", str(folder), "--external-data"]) == 2
    assert "model.mine has no options; leave out external_data" in capsys.readouterr().err
    assert main(["export", str(folder), "--runtime", "openvino"]) == 0
    assert (folder / "model.onnx").is_file()
    assert main(["bench", str(folder), "--rounds", "2"]) == 0
    assert main(["report", str(folder), "--quiet"]) == 0
    assert "my_linear" in (folder / "report.html").read_text(encoding="utf-8")

    # Another target's result in the same folder takes the file away.
    small = fxquant.quantize(page["model"], images(), None, bits=(8,), target="fx_int8", effort="fast", progress=False)
    assert "model.mine" not in [path.name for path in write_outputs(small, folder)]
    assert not (folder / "model.mine").exists()


def test_the_command_line_lists_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _ = run_page(monkeypatch, everything=False)
    for command in ("check", "export", "quantize"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "mine" in capsys.readouterr().out, command
    assert main(["check", "nowhere", "--against", "tpu"]) == 2
