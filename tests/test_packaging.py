"""What setup.cfg says is what there is, and the two links hold."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
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


SMOKE = """
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import torch
import fxquant

here = Path(sys.argv[1])
assert Path(fxquant.__file__).is_relative_to(here), fxquant.__file__
points = {(point.group, point.name): point for point in distribution("fxquant").entry_points}
assert points["console_scripts", "fxquant"].load() is not None
assert points["torch_dynamo_backends", "fxquant"].load() is not None
layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
model, images = torch.nn.Sequential(*layers).eval(), torch.randn(8, 3, 8, 8)
result = fxquant.quantize(model, images, fxquant.Budget(average_bits=6), effort="fast", progress=False)
result.to_onnx(here / "model.onnx")
result.report(here / "report.html")
result.save(here / "saved")
assert torch.equal(fxquant.load(here / "saved").lowered(images), result.lowered(images))
print(result.summary())
"""


@pytest.mark.slow
def test_a_wheel_installs_and_works_away_from_the_checkout(tmp_path: Path) -> None:
    """Built from a copy, so that what an earlier build left beside the sources does not get in."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("fxquant", "passes", "backends"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("fxquant-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"fxquant/{p.relative_to(ROOT / 'fxquant')}" for p in (ROOT / "fxquant").rglob("*.py")}
    shipped |= {
        f"fxquant/{top}/{p.relative_to(ROOT / top)}"
        for top in ("passes", "backends")
        for p in (ROOT / top).rglob("*.py")
    }
    assert {n for n in names if n.endswith(".py")} == shipped
    assert {"fxquant/py.typed", "fxquant/report/report.html.j2", "fxquant/demo/digits_net.safetensors"} <= names
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", SMOKE, str(site)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2 layers quantized" in done.stdout
