"""What is known about an op is in the op table and in one row of each lowering table: no other code names its kind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxquant.core.ir import OPS

ROOT = Path(__file__).parent.parent.parent.parent
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("fxquant", "passes", "backends")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
KINDS = {rule.kind for rule in OPS.values()}

TABLES = {("backends/int8/rules.py", "INTEGER_OPS"), ("backends/onnx/runtime_kernels.py", "RUNTIME_KERNELS")}
"""File and name of the lowering tables."""

OTHER_MEANINGS = {
    ("fxquant/core/storage/pt2_audit.py", "add"): "a function of Python's operator module",
    ("fxquant/core/storage/pt2_audit.py", "mul"): "a function of Python's operator module",
    ("fxquant/dynamo/boundary.py", "reshape"): "a method of tensors in a Dynamo graph",
    **{
        (f"fxquant/core/run/{name}.py", word): "the name of an ATen packet, whatever its overload"
        for name, words in {
            "answer_scores": (
                "channel_shuffle",
                "pixel_shuffle",
                "reshape",
                "sigmoid",
                "slice",
                "softmax",
                "transpose",
            ),
            "joined_outputs": ("cat",),
            "recurrent_states": ("add", "linear", "mul", "relu", "sigmoid"),
        }.items()
        for word in words
    },
    ("backends/onnx/shape_emitters.py", "pad"): "an argument of aten.pad",
}
"""Words that are spelled like a kind -> what they are."""

LOOK_UPS = {"get", "pop", "setdefault", "startswith", "endswith", "index", "count"}
"""Methods whose argument is looked for or compared with."""


def words(node: ast.AST | None) -> Iterator[str]:
    """Yield the kinds that a literal, or a literal collection, holds."""
    if isinstance(node, ast.Constant) and node.value in KINDS:
        yield str(node.value)
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for member in node.elts:
            yield from words(member)


def named_kinds(name: str, text: str) -> set[str]:
    """Return the kinds that a source text compares with, looks up, or gathers in a separate table."""
    tree = ast.parse(text)
    table = {
        inner
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and (name, node.target.id) in TABLES
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        held: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            held = [node.left, *node.comparators]
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            held = [node]
        elif isinstance(node, ast.Dict):
            held = list(node.keys) if node not in table else []
        elif isinstance(node, ast.Subscript):
            held = [node.slice]
        elif isinstance(node, ast.MatchValue):
            held = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOOK_UPS:
            held = list(node.args)
        found.update(word for part in held for word in words(part))
    return {word for word in found if (name, word) not in OTHER_MEANINGS}


def test_no_source_names_a_kind_outside_the_tables() -> None:
    assert len(SOURCES) > 150
    named = {name: kinds for name, text in SOURCES.items() if (kinds := named_kinds(name, text))}
    assert not named, "ask the op's row for a property, or add a column to the op table or to the lowering tables"


@pytest.mark.parametrize(("name", "word"), OTHER_MEANINGS)
def test_every_exception_is_needed(name: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OTHER_MEANINGS, (name, word))
    assert named_kinds(name, SOURCES[name]) == {word}


@pytest.mark.parametrize(
    "planted",
    [
        'rule.kind == "add"',
        '"conv" != rule.kind',
        'rule.kind in ("add", "mul")',
        'rule.kind not in {"linear"}',
        'SUMS = frozenset({"conv"})',
        'ORDER = ["conv", "linear"]',
        'WHY = {"cat": "joins values"}',
        'KINDS = dict.fromkeys(("add",), 1)',
        'row = WHY["add"]',
        'row = WHY.get("add", None)',
        'rule.kind.startswith("conv")',
        '"max_pool" in str(node.target)',
        'match rule.kind:\n    case "add" | "mul":\n        pass',
    ],
)
@pytest.mark.parametrize("name", ["passes/find_edges.py", "backends/int8/rules.py"])
def test_the_check_has_teeth(name: str, planted: str) -> None:
    assert named_kinds(name, f"{SOURCES[name]}\n{planted}\n")


def test_tables_may_name_kinds_and_so_may_prose() -> None:
    for name, variable in TABLES:
        assert variable in SOURCES[name]
        assert not named_kinds(name, SOURCES[name])
        assert named_kinds("passes/other.py", SOURCES[name])
    assert not named_kinds("passes/a.py", 'SOLVERS.register("linear")\nraise ValueError(f"no {kind}: add")')
