"""What setup.cfg says is what there is, and the two links hold."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def declared() -> set[str]:
    """Return the packages that setup.cfg lists."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return set(config["options"]["packages"].split())


def present() -> set[str]:
    """Return the packages that exist: every folder that holds `__init__.py`, links not followed."""
    found = set()
    for top, prefix in (("fxquant", "fxquant"), ("passes", "fxquant.passes"), ("backends", "fxquant.backends")):
        for path in (ROOT / top).rglob("__init__.py"):
            inner = path.parent.relative_to(ROOT / top).parts
            if top == "fxquant" and inner and inner[0] in ("passes", "backends"):
                continue
            found.add(".".join((prefix, *inner)))
    return found


def test_every_package_is_listed() -> None:
    assert declared() == present()


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_link_is_relative_and_resolves(name: str) -> None:
    link = ROOT / "fxquant" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == (ROOT / name).resolve()


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_top_level_import_is_refused(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"ImportError: import fxquant.{name}, not {name}" in done.stderr


def test_typed_marker_is_there() -> None:
    assert (ROOT / "fxquant" / "py.typed").is_file()
