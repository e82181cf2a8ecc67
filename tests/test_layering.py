"""Who may import whom, read from the source; and the few rules of the house that a machine can keep."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"core": "fxquant/core", "passes": "passes", "backends": "backends"}
SOURCES = sorted(
    path
    for folder in ("fxquant", "passes", "backends")
    for path in (ROOT / folder).rglob("*.py")
    if not {"passes", "backends"} & set(path.relative_to(ROOT).parts[1:-1]) or folder != "fxquant"
)
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

FRONT = (
    *("pipeline", "latency", "search", "smallest", "parts", "rounding", "trained", "training", "result", "transfer"),
    *("bench", "report", "check", "api", "compiling", "inspect_onnx"),
    *("fxquant", "inputs", "outputs", "arguments", "demo", "cli"),
)
"""Rooms above the passes and backends, each may import those before it."""

MAY_IMPORT = {
    "core": {"core"},
    "passes": {"core", "passes"},
    "backends": {"core", "backends"},
    "tracing": {"core"},
    **{room: {"core", "passes", "backends", "tracing", *FRONT[: i + 1]} for i, room in enumerate(FRONT)},
    "__main__": {"cli"},
}
"""Room -> rooms it may import."""

WHEN_ASKED = {("fxquant/result.py", "report")}
"""A result writes its report when asked: the import stands in the method, so that results load without templates."""

ATEN = {"fxquant/core/ir/ops.py", "passes/canonicalize.py", "passes/fold_batchnorm.py", "fxquant/capture/trace.py"}

TESTED_ELSEWHERE = {
    "fxquant/core/errors.py": "classes without code; every message is matched where it is raised",
    "fxquant/core/facts/target.py": "tests/core/ir/test_spec.py",
    "passes/base.py": "tests/passes/test_pipeline_order.py",
    "passes/cost": "tests/passes/test_estimate_cost.py",
    "passes/sensitivity": "tests/passes/test_measure_sensitivity.py",
    "passes/allocation": "tests/passes/allocation",
    "backends": "tests/backends",
    "fxquant/demo": "tests/demo",
    "fxquant/report": "tests/report",
    "fxquant/__main__.py": "one call of the command line's main",
}
"""Source file or folder without a test file of its own name -> where its tests are."""


def room_of(module: str) -> str:
    """Return the room of a dotted module name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def module_of(name: str) -> str:
    """Return the dotted module name of a source file."""
    dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return dotted if dotted.startswith("fxquant") else f"fxquant.{dotted}"


def imports_of(text: str) -> set[str]:
    """Return the modules a source text imports, `from a import b` as `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "fxquant":
            modules = {alias.name for alias in node.names if (ROOT / "fxquant" / f"{alias.name}.py").is_file()}
            found.update(f"fxquant.{name}" for name in modules)
            found.update("fxquant" for alias in node.names if alias.name not in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def wrong_imports(name: str, text: str) -> list[str]:
    """Return the imports of fxquant that this file may not have."""
    room, module = room_of(module_of(name)), module_of(name)
    ours = {m for m in imports_of(text) if m == "fxquant" or m.startswith("fxquant.")}
    wrong = {m for m in ours if room_of(m) not in MAY_IMPORT[room] and (name, room_of(m)) not in WHEN_ASKED}
    if room == "passes":
        wrong |= {m for m in ours if m.startswith("fxquant.passes.") and not _may_read_pass(module, m)}
    return sorted(wrong)


def _may_read_pass(reader: str, other: str) -> bool:
    """Whether one file of passes/ may import another: base, a registry package, or its own package."""
    if other == "fxquant.passes.base":
        return True
    package = ".".join(other.split(".")[:3])
    return (ROOT / "passes" / package.rsplit(".", 1)[1]).is_dir() and (
        reader.startswith(package) or reader.count(".") == 2
    )


def test_there_are_sources_of_every_room() -> None:
    assert len(SOURCES) > 40
    assert {"fxquant/core/ir/ops.py", "passes/find_edges.py", "backends/base.py"} <= set(NAMES)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_downwards(name: str) -> None:
    wrong = wrong_imports(name, (ROOT / name).read_text())
    assert not wrong, f"{name} imports {wrong}; allowed rooms: {sorted(MAY_IMPORT[room_of(module_of(name))])}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fxquant/core/ir/ops.py", "from fxquant.passes.base import Pass"),
        ("fxquant/core/ir/ops.py", "from fxquant import capture"),
        ("passes/calibrate.py", "from fxquant.passes.find_edges import FindEdges"),
        ("passes/calibrate.py", "import fxquant.backends.base"),
        ("backends/base.py", "from fxquant.passes.base import Pass"),
        ("passes/cost/size.py", "from fxquant.passes.sensitivity import ESTIMATORS"),
        ("fxquant/flow/pipeline.py", "from fxquant.api import quantize"),
    ],
)
def test_the_checker_has_teeth(name: str, text: str) -> None:
    assert wrong_imports(name, text)


@pytest.mark.parametrize("name", NAMES)
def test_house_rules(name: str) -> None:
    text = (ROOT / name).read_text()
    modules = imports_of(text)
    assert not any(m.startswith("torch.ao") or m == "pickle" for m in modules), "deprecated or unsafe import"
    assert len(text.splitlines()) <= 400, "one thing per file: split it"
    assert Path(name).name not in ("utils.py", "helpers.py", "common.py", "misc.py"), "name it for what it does"
    assert not re.search(r"#.*\b(TODO|FIXME|XXX)\b|type: ignore|# noqa|pragma: no cover", text)
    assert ast.get_docstring(ast.parse(text)) or name.endswith("__init__.py"), "a file says what it is"


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("backends", "fxquant/demo"))])
def test_only_the_op_table_knows_ops(name: str) -> None:
    uses = re.search(r"\baten\.\w", (ROOT / name).read_text())
    assert uses is None or name in ATEN, "ask fxquant.core.ir.ops for a property instead"


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("__init__.py")])
def test_every_source_has_its_test(name: str) -> None:
    if any(name == known or name.startswith(f"{known}/") for known in TESTED_ELSEWHERE):
        return
    relative = Path(name.removeprefix("fxquant/"))
    assert (ROOT / "tests" / relative.parent / f"test_{relative.name}").is_file()


@pytest.mark.parametrize("place", sorted(set(TESTED_ELSEWHERE.values())))
def test_where_tests_are_said_to_be_there_are_some(place: str) -> None:
    if place.startswith("tests/"):
        assert list(ROOT.glob(place if place.endswith(".py") else f"{place}/test_*.py"))
