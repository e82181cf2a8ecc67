"""Every benchmark can be imported and says what it measures."""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from pathlib import Path

import pytest

import benchmarks

FOLDER = Path(benchmarks.__file__).parent
SCRIPTS = [path.stem for path in sorted(FOLDER.glob("*.py")) if '__name__ == "__main__"' in path.read_text()]


def start(name: str) -> None:
    with warnings.catch_warnings():
        # In this process, since an import of torch takes seconds; a script that another one imported runs once more.
        warnings.filterwarnings("ignore", message=".*found in sys.modules")
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    # Some scripts set the threads of libraries while they are imported.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(SystemExit) as ended:
        start(name)
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_readme_names_every_script() -> None:
    text = (FOLDER / "README.md").read_text()
    # `contestants` is the child process of `peers`, and `equal_bytes` has two.
    children = ["contestants", "equal_bytes_contestants", "equal_bytes_peers"]
    assert [name for name in SCRIPTS if f"benchmarks.{name}`" not in text] == children
