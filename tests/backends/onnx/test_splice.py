"""Pieces that PyTorch's exporter writes: its table of ops is made once, and it is as it was afterwards."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant

REGISTRATION = "torch.onnx._internal.exporter._registration"


def test_the_exporters_table_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = import_module(REGISTRATION).ONNXRegistry
    before, calls = vars(registry)["from_torchlib"].__func__, list[int]()

    def counted(kind: type, *args: Any, **kwargs: Any) -> object:
        calls.append(1)
        made: object = before(kind, *args, **kwargs)
        return made

    monkeypatch.setattr("fxquant.backends.onnx.splice._TABLES", {})
    monkeypatch.setattr(registry, "from_torchlib", classmethod(counted))
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ELU(), nn.Conv2d(4, 4, 3)), torch.rand(4, 3, 8, 8)
    result = fxquant.quantize(model, images, {"average_bits": 8}, bits=(8,), effort="fast", progress=False)
    files = [result.to_onnx(tmp_path / f"{k}.onnx").path.read_bytes() for k in range(2)]
    assert files[0] == files[1]
    assert calls == [1]
    assert vars(registry)["from_torchlib"].__func__ is counted


def test_an_exporter_without_that_table_works_as_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxquant.backends.onnx.splice._REGISTRATION", "torch.nowhere")
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ELU()), torch.rand(4, 3, 8, 8)
    result = fxquant.quantize(model, images, {"average_bits": 8}, bits=(8,), effort="fast", progress=False)
    assert result.to_onnx(tmp_path / "net.onnx").nodes["Elu"] == 1
