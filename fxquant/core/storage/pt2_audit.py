"""What a `.pt2` file holds, looked at before `torch.export.load`, which runs code that a file brings along.

PyTorch unpickles weights and constants that say they are pickled, loads compiled libraries, evaluates size expressions,
looks operators up by dotted name, and writes Python source from names. Each of these is refused here unless it is
what an exported network needs: raw tensors, registered operators, arithmetic on sizes, plain names.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from fxquant.core.errors import FileFormatError

FOLDERS = ("models/", "data/weights/", "data/constants/", "data/sample_inputs/", "extra/", ".data/")
FILES = frozenset({"archive_format", "archive_version", "byteorder", "version"})
"""Where an archive may have entries; `data/aotinductor/`, which is machine code, is not among them."""
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
MODEL, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"

COMMENTS = frozenset({"metadata", "guards_code", "as_string", "as_strings"})
"""Fields that never become code: source lines, guards (which are never checked here), and text arguments."""
OPERATORS = frozenset({"target", "as_operator"})
TREES = frozenset({"in_spec", "out_spec", "treespec"})
NAME = re.compile(r"[\w.+\-/:|, ]*")
"""Texts that may go into source: nothing among them calls, assigns, quotes or begins a line."""
TREE = re.compile(r'[\w.+\-/:|, "\[\]{}\\]*')
SYMBOL = re.compile(r"[a-z]+[0-9]{1,6}")
ARITHMETIC = frozenset(
    "_operator." + name
    for name in (
        *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs", "getitem"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_", "lshift", "rshift"),
    )
) | {"math.ceil", "math.floor", "math.trunc", "math.sqrt"}
FUNCTIONS = frozenset(
    (
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Mod", "Max", "Min", "Abs", "floor", "ceiling"),
        *("And", "Or", "Not", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan"),
        *("LessThan", "StrictGreaterThan", "GreaterThan", "FloorDiv", "ModularIndexing", "Where", "PythonMod"),
        *("CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "ToFloat", "TruncToFloat"),
        *("IntTrueDiv", "FloatTrueDiv", "Identity", "true", "false", "True", "False", "positive", "integer"),
        *("nonnegative", "nonzero", "negative", "real", "finite", "rational", "commutative", "precision", "dps"),
    )
)
"""Words of a size expression other than symbols; sympy evaluates the expression as Python."""
POWER = re.compile(r"Pow\(Symbol\('[a-z]+[0-9]{1,6}'(?:, [a-z]+=True)*\), Integer\(-?[0-9]\)\)")
TOKEN = re.compile(r"[A-Za-z_]\w*|[0-9]+(?:\.[0-9]+)?|'[\w.+\-]*'|[-+/(),=<> ]|\*(?!\*)|\*\*[23](?![\w*.])")
LONGEST = 4000
"""Letters of a size expression."""
SPREAD, SMALL = 64, 1 << 24
"""A weight may have this many times the elements that its file holds (it may be expanded), or this many at all."""


def audit(stream: IO[bytes], path: Path) -> None:
    """Check that an archive runs nothing but registered operators.

    What is none of torch's archives, or a damaged one, may raise anything.

    Args:
        stream: the open file; loading it from the same stream loads what was looked at.
        path: its name, for messages.

    Raises:
        FileFormatError: it has pickled, compiled, compressed or otherwise runnable parts.
    """
    _check_entries(stream, path)
    stream.seek(0)
    # Torch's own reader, so that there is one opinion on what the archive holds.
    reader = torch._C.PyTorchFileReader(stream)
    names = set(reader.get_all_records())
    strange = sorted(name for name in names if not (name in FILES or name.startswith(FOLDERS)))
    if strange:
        raise _refused(path, f"has an entry {strange[0][:100]!r}, which is no part of an exported program")
    if any(name.startswith("models/") and name != MODEL for name in names):
        raise _refused(path, "holds several models")
    for name in CONFIGS:
        _check_payloads(json.loads(reader.get_record(name)), reader, name, path)
    pickled = sorted(name for name in names if name.endswith(".pt") and name != SAMPLES)
    if pickled:
        raise _refused(path, f"has a pickled part {pickled[0]!r}")
    if SAMPLES in names:
        _check_samples(reader.get_record(SAMPLES), path)
    for reason in _runnable(json.loads(reader.get_record(MODEL))):
        raise _refused(path, reason)


def _refused(path: Path, reason: str) -> FileFormatError:
    return FileFormatError(f"{path} {reason}, so it is not loaded; export the model again with torch.export.save")


def _check_entries(stream: IO[bytes], path: Path) -> None:
    """Refuse what torch never writes and only attacks need: compression, overlaps, doubles, names that lead outside."""
    size = stream.seek(0, 2)
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
    # Torch looks names up without regard to case.
    if len({entry.filename.casefold() for entry in entries}) < len(entries):
        raise _refused(path, "has two entries of one name")
    if len({entry.filename.partition("/")[0] for entry in entries}) != 1:
        raise _refused(path, "is no archive of torch.export.save")
    outside = [e.filename for e in entries if ".." in e.filename.split("/") or e.filename.startswith("/")]
    if outside or any("\\" in entry.filename or not entry.filename.isprintable() for entry in entries):
        raise _refused(path, "has entries whose names lead elsewhere")
    if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
        raise _refused(path, "has compressed entries, which torch does not write")
    if sum(entry.file_size for entry in entries) > size:
        raise _refused(path, f"claims to hold more than its {size} bytes")


def _check_payloads(document: Any, reader: Any, name: str, path: Path) -> None:
    folder = name.rpartition("/")[0]
    for weight, entry in document["config"].items():
        place = str(entry["path_name"])
        if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_[0-9]+", place):
            raise _refused(path, f"has a pickled part, {weight[:100]!r}")
        meta = entry["tensor_meta"]
        elements = math.prod(int(size["as_int"]) for size in meta["sizes"])
        if elements > max(SMALL, SPREAD * reader.get_record_size(f"{folder}/{place}")):
            raise _refused(path, f"says that {weight[:100]!r} has {elements} elements, which it does not hold")


def _check_samples(pickled: bytes, path: Path) -> None:
    """Refuse example inputs beyond tensors; torch would unpickle anything else without restriction."""
    if not pickled:
        return
    try:
        _ = torch.load(io.BytesIO(pickled), weights_only=True)
    except Exception as error:
        raise _refused(path, "has example inputs that are more than tensors") from error


def _runnable(document: Any) -> Iterator[str]:
    """Yield what in a model's description could run code of the file's own."""
    waiting: list[tuple[str, Any]] = [("", document)]
    while waiting:
        field, value = waiting.pop()
        if field in COMMENTS:
            continue
        if isinstance(value, dict):
            waiting += [(key, each) for key, each in value.items()]
            # Constrained sizes are expressions; all other keys are names.
            waiting += [("expr_str" if field == "range_constraints" else "key", key) for key in value]
        elif isinstance(value, list):
            waiting += [(field, each) for each in value]
        elif isinstance(value, str) and not _harmless(field, value):
            yield f"has {value[:100]!r} as {field!r}, from which torch would make code"


def _harmless(field: str, value: str) -> bool:
    if field in OPERATORS:
        return is_operator(value)
    if field == "expr_str":
        return is_arithmetic(value)
    return (TREE if field in TREES else NAME).fullmatch(value) is not None


def is_operator(target: str) -> bool:
    """Return whether a dotted name is a registered operator that opens no files, or arithmetic on sizes."""
    if target in ARITHMETIC or re.fullmatch(r"torch\._?sym_[a-z]+", target):
        return True
    if not target.startswith("torch.ops."):
        return False
    found: Any = torch.ops
    for part in target.split(".")[2:]:
        found = getattr(found, part, None)
    if isinstance(found, OpOverload):
        return not any(argument.name == "filename" for argument in found._schema.arguments)
    return isinstance(found, HigherOrderOperator)


def is_arithmetic(expression: str) -> bool:
    """Return whether a size expression is made of symbols, numbers and known functions alone."""
    if len(expression) > LONGEST:
        return False
    rest = POWER.sub("1", expression)
    tokens = TOKEN.findall(rest)
    if "".join(tokens) != rest:
        return False
    words = [token for token in tokens if token[0].isalpha() or token[0] == "_"]
    numbers = [token for token in tokens if token[0].isdigit()]
    known = all(word in FUNCTIONS or SYMBOL.fullmatch(word) for word in words)
    return known and all(len(number) <= 20 for number in numbers)
