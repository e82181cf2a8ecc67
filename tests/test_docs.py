"""The documentation says what is: pages, links, flags, names, and code that runs."""

from __future__ import annotations

import argparse
import configparser
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

import fxquant
from fxquant.backends import BACKENDS
from fxquant.backends.int8 import INTEGER_OPS
from fxquant.backends.onnx import RUNTIME_KERNELS
from fxquant.cli import COMMANDS, build_parser
from fxquant.core.facts import EFFORTS
from fxquant.core.ir import OPS
from fxquant.passes.allocation import SOLVERS
from fxquant.passes.formats import FORMATS
from fxquant.passes.rounding import ROUNDERS
from fxquant.passes.rounding.learned import Reconstruction
from fxquant.passes.sensitivity import ESTIMATORS
from fxquant.recipes import RECIPES
from tests.small import images, small

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
TEXTS = {name: (DOCS / name).read_text(encoding="utf-8") for name in PAGES}
OUTSIDE = {"CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")}
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, kind: str) -> list[tuple[str, str]]:
    """Return (mark, code) of each block of a language."""
    return [(m["mark"] or "", m["code"]) for m in BLOCK.finditer(text) if m["kind"] == kind]


def runnable(name: str) -> list[str]:
    return [code for mark, code in blocks(TEXTS[name], "python") if mark == "tested"]


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def row_names(text: str) -> list[str]:
    """Return the names in the first column of tables, which are set as code."""
    return re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)


def slug(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")


@pytest.fixture
def tables() -> Iterator[None]:
    """Put every registry back as it was."""
    live: list[dict[Any, Any]] = [
        OPS,
        INTEGER_OPS,
        RUNTIME_KERNELS,
        BACKENDS,
        ESTIMATORS._entries,
        FORMATS._entries,
        RECIPES._entries,
        ROUNDERS._entries,
        SOLVERS._entries,
    ]
    kept = [dict(table) for table in live]
    yield
    for table, entries in zip(live, kept, strict=True):
        table.clear()
        table.update(entries)


def test_navigation_holds_every_page_and_no_other() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert sorted(re.findall(r": ([\w-]+\.md)$", nav, re.MULTILINE)) == PAGES
    assert len(PAGES) > 10


@pytest.mark.parametrize("name", [*PAGES, *OUTSIDE])
def test_links_lead_somewhere(name: str) -> None:
    text, folder = (TEXTS[name], DOCS) if name in TEXTS else (OUTSIDE[name], ROOT)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (folder / place).resolve() if place else folder / name
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [slug(heading) for heading in headings], link


@pytest.mark.parametrize("name", [name for name in PAGES if blocks(TEXTS[name], "python")])
def test_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: None) -> None:
    del tables
    shown = blocks(TEXTS[name], "python")
    unmarked = [code for mark, code in shown if mark != "tested" and not mark.startswith("not run: ")]
    assert not unmarked, "mark it as tested, or say why it is not run"
    title = re.match(r"# (\w+)\.py\n", shown[0][1])
    module = ModuleType(title[1] if title else "page")
    # A backend is named by module and class.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    space = vars(module)
    space |= {"model": small(), "calibration": images(24), "unseen_images": images(80), "images": images(3)}
    for code in runnable(name):
        exec(compile(code, f"docs/{name}", "exec"), space)
    logits = space.get("logits")
    assert logits is None or tuple(logits.shape) == (3, 3)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='the site needs pip install "fxquant[docs]"')
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "repository" / "benchmarks" / "results" / "peers.json").is_file()
    assert "fxquant.Budget" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")


def commands() -> dict[str, set[str]]:
    """Return the flags of every command."""

    def refuse(message: str) -> NoReturn:
        raise AssertionError(message)

    parser = build_parser(COMMANDS, refuse)
    (chosen,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {name: set(sub._option_string_actions) for name, sub in chosen.choices.items()}


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_flags_exist(name: str) -> None:
    known = commands()
    every = set().union(*known.values())
    for _, code in blocks(TEXTS[name], "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            called = re.match(r"(?:\S*/)?fxquant ([\w-]+)(.*)", line.strip())
            if called is None:
                continue
            flags = set(re.findall(r"(?<!\S)--[\w-]+", called[2]))
            assert called[1] == "--help" or flags <= known[called[1]], line
    for flag in re.findall(r"`(--[\w-]+)", prose(TEXTS[name])):
        assert flag in every, flag
    for command in re.findall(r"`fxquant ([\w-]+)", prose(TEXTS[name])):
        assert command in known, command


def test_every_algorithm_is_described() -> None:
    names = row_names(TEXTS["rounding.md"])
    options = {field.name for field in fields(Reconstruction)}
    algorithms = [name for name in names if name not in options]
    assert algorithms == list(dict.fromkeys(algorithms))
    assert set(algorithms) == set(ROUNDERS)
    assert set(names) - set(algorithms) <= options
    assert len(set(names) & options) > 8
    for effort, preset in EFFORTS.items():
        assert re.search(rf'"{effort}" (takes )?`{preset.rounding}`', TEXTS["rounding.md"]), effort
    for chain in re.findall(r"`([\w-]+(?:\+[\w-]+)+)`|--rounding ([\w+-]+)", TEXTS["rounding.md"]):
        assert set("".join(chain).split("+")) <= set(ROUNDERS), chain


def test_every_estimator_is_named() -> None:
    assert {name for name in ESTIMATORS if f"`{name}`" not in TEXTS["how-it-works.md"]} == set()


def test_the_reference_names_what_there_is() -> None:
    named = re.findall(r"^::: (\S+)$", TEXTS["api.md"], re.MULTILINE)
    for name in named:
        parts = name.split(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(".".join(parts[:-1])), parts[-1]), name
    assert {f"fxquant.{name}" for name in fxquant.__all__} <= set(named)


def test_every_question_names_the_test_that_holds_the_answer() -> None:
    sections = re.split(r"^## (\d+)\. ", TEXTS["faq.md"], flags=re.MULTILINE)[1:]
    assert [int(number) for number in sections[::2]] == list(range(1, 25))
    for number, section in zip(sections[::2], sections[1::2], strict=True):
        held = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", section)
        assert held or "*Open*" in section, number
        for place, name in held:
            assert f"\ndef {name}(" in (ROOT / place).read_text(encoding="utf-8"), f"{number}: {place}::{name}"


@pytest.mark.parametrize("name", [*PAGES, *OUTSIDE])
def test_files_that_are_named_exist(name: str) -> None:
    text = TEXTS.get(name) or OUTSIDE[name]
    for place in re.findall(r"`((?:fxquant|passes|backends|tests|benchmarks|examples|docs)/[\w/.]*)`", text):
        assert (ROOT / place).exists(), place
    for module in re.findall(r"python -m (benchmarks\.\w+|tests)\b", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists() or (ROOT / module).is_dir(), module


def test_results_are_all_linked() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"(../benchmarks/results/{path.name})" in TEXTS["benchmarks.md"], path.name


def test_lines_are_as_long_as_those_of_the_source() -> None:
    for name in PAGES:
        wide = [line for line in prose(TEXTS[name]).splitlines() if len(line) > 120 and not line.startswith("|")]
        assert not wide, wide


def test_the_extra_is_declared() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert "mkdocs-material" in config["options.extras_require"]["docs"]
    assert "mkdocstrings" in config["options.extras_require"]["docs"]
