"""Every example runs unchanged, in its own folder; `finetune` is held by tests/qat/test_loop.py."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fxquant

FOLDER = Path(__file__).parent.parent / "examples"
TEXT = (Path(__file__).parent.parent / "docs" / "examples.md").read_text(encoding="utf-8")


def example(name: str) -> Callable[..., Any]:
    """Return what an example does."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Tracing looks a model's class up by its module.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    main: Callable[..., Any] = module.main
    return main


@pytest.mark.slow
def test_own_cnn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = example("own_cnn")(tmp_path)
    assert result.allocation.used["size_ratio"] <= 0.25
    assert (tmp_path / "model.onnx").is_file()
    assert "answers are the float model's" in capsys.readouterr().out


@pytest.mark.slow
def test_vision_transformer(tmp_path: Path) -> None:
    result = example("vision_transformer")(tmp_path)
    assert result.allocation.quality["disagreement"] <= 0.1
    assert len(result.allocation.choices) == 14
    assert (tmp_path / "report.html").is_file()


def test_exported_program(tmp_path: Path) -> None:
    result = example("exported_program")(tmp_path)
    assert result.allocation.used["average_bits"] <= 6
    assert (tmp_path / "quantized.pt2").is_file()


def test_custom_target(tmp_path: Path) -> None:
    result = example("custom_target")(tmp_path)
    assert {choice.label for choice in result.allocation.choices.values()} == {"W4A8", "W8A8"}
    assert fxquant.load(tmp_path / "result").allocation == result.allocation


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm_model(tmp_path: Path) -> None:
    assert example("timm_model")(tmp_path).allocation.choices


def test_the_documentation_lists_them() -> None:
    assert set(re.findall(r"examples/(\w+)\.py\)", TEXT)) == {path.stem for path in FOLDER.glob("*.py")}
