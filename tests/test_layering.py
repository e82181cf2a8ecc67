"""Who may import whom, read from the source; and the house rules that a machine can check."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = (
    ("core.errors",),
    ("core.ir", "core.registry", "core.storage"),
    ("core.host",),
    ("core.facts",),
    ("core.run",),
    ("passes", "backends"),
    ("capture", "qat"),
    ("recipes",),
    ("flow",),
    ("report",),
    ("routed", "saved_parts"),
    ("result",),
    ("bench", "outputs", "parity", "parts"),
    ("api",),
    ("fxquant",),
    ("demo", "dynamo"),
    ("cli",),
    ("__main__",),
)
"""Rooms from the ground up. A room imports from lower floors only; `passes` and `backends` share one, so neither sees
the other."""

ATEN = {
    *("fxquant/core/ir/ops.py", "fxquant/capture/decompositions.py", "fxquant/capture/free_batch.py"),
    *("passes/equalization/channel_factors.py", "passes/equalization/factor_ops.py"),
    *("passes/canonicalize.py", "passes/core_aten.py", "passes/linear_layers.py"),
    "passes/reshaping/new_shape.py",
    *("passes/fold_affine.py", "passes/fold_batchnorm.py"),
    *("passes/rewrite_transposed.py", "passes/recurrent_cells.py"),
    "passes/rewrite_activations.py",
    *("passes/rewrite_volumes.py", "passes/volume_moves.py", "passes/new_form.py"),
}
"""Files that may name ATen overloads, in addition to the lowering tables of the backends."""

FACE_IMPORT = re.compile(r"from (fxquant[\w.]*) import (\([^)]*\)|[^\n(]*)")

FORBIDDEN_NAMES = ("utils.py", "helpers.py", "common.py", "misc.py")
SAME_NAME_ALLOWED = {"__init__", "__main__", "base", "backend", "registry"}


def sources() -> dict[str, str]:
    """Return path -> text of every source file, each once (fxquant/passes and fxquant/backends are links)."""
    found = {}
    for top in ("fxquant", "passes", "backends"):
        for path in sorted((ROOT / top).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if top != "fxquant" or relative.parts[1] not in ("passes", "backends"):
                found[str(relative)] = path.read_text()
    return found


@cache
def modules() -> dict[str, str]:
    """Return dotted module name without `fxquant.` -> source path."""
    return {module_of(path): path for path in sources()}


def module_of(path: str) -> str:
    """Return the dotted name of a source file, without `fxquant.` and `__init__`."""
    dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return dotted.removeprefix("fxquant.")


def imports_of(text: str) -> Iterator[str]:
    """Yield the dotted names a source imports from fxquant, as modules where they are modules."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("fxquant.") for a in node.names if a.name.split(".")[0] == "fxquant")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fxquant":
            place = node.module.removeprefix("fxquant").removeprefix(".")
            for alias in node.names:
                full = f"{place}.{alias.name}".removeprefix(".")
                yield full if full in modules() else place or "fxquant"


def room_of(module: str) -> str:
    """Return the room of a module: `core.ir`, `passes`, `api`, ..."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "core" else parts[0]


def floor_of(room: str) -> int:
    """Return the floor of a room, 0 for the ground."""
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def _is_package(module: str) -> bool:
    return modules().get(module, "").endswith("__init__.py")


def _package(module: str) -> str:
    return module if _is_package(module) else module.rpartition(".")[0]


def imported(text: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of every `from fxquant... import name`, anywhere in a text."""
    for place, names in FACE_IMPORT.findall(text):
        yield from ((place, name) for name in re.findall(r"\w+", names))


def wrong_imports(path: str, text: str) -> list[str]:
    """Return what this file imports from a floor that is not below its own."""
    room = room_of(module_of(path))
    others = {other for other in imports_of(text) if room_of(other) != room}
    return sorted(other for other in others if floor_of(room_of(other)) >= floor_of(room))


def knot_of(module: str) -> str:
    """Return what may not be in a circle: a package, or one file of a room whose files import its sub-packages."""
    package = _package(module)
    alone = package in ("passes", "passes.rounding", "backends", "", "core")
    return module if alone else package


def test_packages_form_no_circle() -> None:
    below: dict[str, set[str]] = {}
    for path, text in sources().items():
        knot = knot_of(module_of(path))
        if knot not in ("fxquant", "passes", "backends"):
            below.setdefault(knot, set()).update(knot_of(other) for other in imports_of(text))
            below[knot] -= {knot}
    order = list(TopologicalSorter(below).static_order())
    assert order.index("core.ir") < order.index("passes.find_edges") < order.index("flow")


def test_imports_go_downwards() -> None:
    wrong = {path: found for path, text in sources().items() if (found := wrong_imports(path, text))}
    assert not wrong
    assert len(sources()) > 150
    assert {room_of(module) for module in modules()} - {"core"} == {room for rooms in FLOORS for room in rooms}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("fxquant/core/ir/ops.py", "from fxquant.passes.base import Pass"),
        ("fxquant/core/ir/ops.py", "from fxquant.core.facts import Settings"),
        ("fxquant/core/ir/ops.py", "from fxquant import capture"),
        ("fxquant/core/run/replay.py", "import fxquant.flow"),
        ("passes/calibrate.py", "import fxquant.backends.base"),
        ("backends/base.py", "from fxquant.passes.base import Pass"),
        ("fxquant/flow/pipeline.py", "from fxquant.api import quantize"),
        ("fxquant/result.py", "from fxquant.cli import main"),
    ],
)
def test_imports_upwards_are_found(path: str, text: str) -> None:
    assert wrong_imports(path, text)


def test_house_rules() -> None:
    wrong = []
    for path, text in sources().items():
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.MULTILINE)
        rules = {
            "deprecated or unsafe import": any(m.startswith("torch.ao") or m == "pickle" for m in imported),
            "over 400 lines": len(text.splitlines()) > 400,
            "a name that says nothing": Path(path).name in FORBIDDEN_NAMES,
            "left for later": bool(re.search(r"#.*\b(TODO|FIXME|XXX)\b|type: ignore|# noqa|pragma: no cover", text)),
            "no docstring": not ast.get_docstring(ast.parse(text)),
            "ATen overload outside the tables": path not in ATEN
            and not path.startswith(("backends", "fxquant/demo"))
            and re.search(r"\baten\.\w", text),
        }
        wrong += [f"{path}: {rule}" for rule, broken in rules.items() if broken]
    names = Counter(Path(path).stem for path in sources())
    wrong += [f"two modules named {n}" for n, count in names.items() if count > 1 and n not in SAME_NAME_ALLOWED]
    assert not wrong


def test_tests_use_the_faces_of_packages() -> None:
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fxquant."):
                module = node.module.removeprefix("fxquant.")
                inner = module in modules() and not _is_package(module) and room_of(module) != module
                wrong += [f"{path.name}: {node.module}"] if inner else []
    assert not wrong


def test_faces_hold_what_is_used_outside_and_no_more() -> None:
    places = (ROOT / top for top in ("fxquant", "passes", "backends", "tests", "benchmarks", "examples", "docs"))
    files = {file: file.read_text() for place in places for file in place.rglob("*.[pm][yd]")}
    used = {f"{place}.{name}" for text in files.values() for place, name in imported(text)}
    # A face that is imported as a whole is used through its attributes.
    attributes = {name for text in files.values() for name in re.findall(r"\.(\w+)", text)}
    unused = []
    for path, text in sources().items():
        package = "fxquant." + module_of(path)
        if path.endswith("__init__.py") and path != "fxquant/__init__.py":
            # A module is imported as such for what it registers.
            unused += [
                f"{package}.{name}"
                for place, name in imported(text)
                if f"{package}.{name}" not in used and name not in attributes
                if f"{place}.{name}".removeprefix("fxquant.") not in modules()
            ]
    assert not unused


def test_every_room_has_tests() -> None:
    for module, path in modules().items():
        room = _package(module) or module
        if path.endswith("__init__.py") and room not in ("fxquant", "core"):
            assert list((ROOT / "tests" / room.replace(".", "/")).glob("test_*.py")), room
        elif "." not in module and module not in ("fxquant", "core", "__main__"):
            assert (ROOT / "tests" / f"test_{module}.py").is_file(), module
