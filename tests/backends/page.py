"""The code of the page on backends, run as a reader would."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fxquant.backends import BACKENDS
from tests.small import images, small

PAGE = Path(__file__).parents[2] / "docs" / "add-a-backend.md"


def run_page(monkeypatch: pytest.MonkeyPatch, everything: bool = True) -> dict[str, Any]:
    """Run the page's code with the small network, and return its names; the registry is put back after the test.

    Args:
        monkeypatch: puts things back.
        everything: False only registers the backend.
    """
    first, second = (part.split("```")[0] for part in PAGE.read_text(encoding="utf-8").split("```python\n")[1:])
    module = ModuleType("my_backend")
    monkeypatch.setitem(sys.modules, "my_backend", module)
    monkeypatch.setitem(BACKENDS, "mine", "my_backend:mine")
    space = vars(module)
    space |= {"model": small(), "calibration": images(24), "images": images(3)}
    exec(compile(first, str(PAGE), "exec"), space)
    if everything:
        exec(compile(second, str(PAGE), "exec"), space)
    return space
