"""Damaged, foreign and hostile files, the same for every reader: read as they are, or one error that names the file."""

from __future__ import annotations

import ast
import copy
import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxquant.core.errors import InputError
from fxquant.core.storage import read_arrays, write_arrays
from tests.readers import OPENED_ELSEWHERE, READERS, Evil, Reader
from tests.test_layering import sources

pytestmark = pytest.mark.filterwarnings("ignore:.*is damaged")

FUZZ = settings(
    max_examples=int(os.environ.get("FXQUANT_FUZZ", "60")),
    deadline=None,
    derandomize="FXQUANT_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""`FXQUANT_FUZZ=5000` searches at length, from another seed each time."""


OPENERS = {
    "read_json",
    "read_arrays",
    "read_array",
    "read_tensors",
    "load_exported",
    "StoredProgram.load",
    "load_file",
    "read_text",
}
OPENERS |= {"read_bytes", "parse_json", "unpack_arrays"}
OPENERS |= {"np.load", "torch.load", "torch.export.load", "onnx.load", "onnx.load_model", "onnx.load_model_from_string"}
OPENERS |= {"Image.open"}


def openers(text: str) -> set[str]:
    """Return the functions of a source text that read a file."""
    found = set()
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                reads = called.endswith("open") and "'rb'" in map(ast.unparse, node.args)
                found |= {function.name} if reads or {called, called.rpartition(".")[2]} & OPENERS else set()
    return found


def test_the_table_has_every_reader() -> None:
    known = {place for reader in READERS.values() for place in reader.opens.split()}
    found = {f"{name}:{function}" for name, text in sources().items() for function in openers(text)}
    inner = {place for place in found if place.partition(":")[0] in OPENED_ELSEWHERE}
    assert found - inner == known
    assert {place.partition(":")[0] for place in inner} == set(OPENED_ELSEWHERE)


def torch_pickle(path: Path, mark: Path) -> None:
    torch.save(Evil(mark), path)


def plain_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(f"cos\nmkdir\n(S'{mark}'\ntR.".encode())


def numpy_pickle(path: Path, mark: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.array([Evil(mark)], dtype=object), allow_pickle=True)


def npz_pickle(path: Path, mark: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, allow_pickle=True, header=np.array([Evil(mark)], dtype=object))


def npy_header(shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression, compresslevel=1) as made:
        for name, data in entries.items():
            made.writestr(name, data)
    return stream.getvalue()


@cache
def packed_zeros() -> bytes:
    """Return 300 MB of zeros packed into 300 kB."""
    return archive({"x.npy": npy_header((3 * 10**8 // 8,)) + bytes(3 * 10**8)}, zipfile.ZIP_DEFLATED)


def huge_safetensors() -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**13], "data_offsets": [0, 4 * 10**13]}}).encode()
    return struct.pack("<Q", len(header)) + header


CONTENTS: dict[str, bytes | Callable[[], bytes]] = {
    "empty": b"",
    "noise": np.random.default_rng(0).bytes(3000),
    "zeros": bytes(3000),
    "another kind of document": b'{"kind": "shopping list", "version": 1}',
    "no object": b"[1, 2]",
    "no text": b'{"kind": "plan", "version": 1, "choices": {"\xff\xfe": 1}}',
    "nested without end": b"[" * 10**5,
    "a number without end": b"1" * 5000,
    "huge array": archive({"header.npy": npy_header((10**13,))}),
    "huge npy": npy_header((10**13,)),
    "bomb": packed_zeros,
    "huge safetensors": huge_safetensors(),
    "header without end": struct.pack("<Q", 2**62) + b"{",
    "names that lead outside": archive({"../../outside.npy": b"x", "/outside.npy": b"x", "a\n.npy": b"x"}),
}
PLACES: dict[str, Callable[[Path], None]] = {
    "missing": lambda _: None,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "pipe": os.mkfifo,
}
PICKLES = {make.__name__: make for make in (torch_pickle, plain_pickle, numpy_pickle, npz_pickle)}
DAMAGES = (*CONTENTS, *PLACES, *PICKLES)
"""What a file may be instead of what it should be; none of them is a good file of any kind."""


def spoil(path: Path, damage: str, mark: Path) -> None:
    """Put this in the place of a file; what is pickled makes the folder `mark`."""
    path.unlink()
    if damage in PLACES:
        PLACES[damage](path)
    elif damage in PICKLES:
        PICKLES[damage](path, mark)
    else:
        data = CONTENTS[damage]
        path.write_bytes(data if isinstance(data, bytes) else data())


def outcome(reader: Reader, path: Path) -> str:
    """Return "read", "nothing" or "refused"; any error but one of bad input fails the test."""
    try:
        found = reader.read(path)
    except InputError as error:
        return "refused" if path.name in str(error) else f"not named: {error}"
    return "nothing" if found is None and reader.forgiving else "read"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", READERS)
def test_a_good_file_is_read(kind: str, tmp_path: Path) -> None:
    assert outcome(READERS[kind], READERS[kind].made(tmp_path)) == "read"


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_refuses_what_is_no_file_of_its_kind(kind: str, tmp_path: Path) -> None:
    reader = READERS[kind]
    for number, damage in enumerate(DAMAGES):
        path, mark = reader.made(tmp_path / str(number)), tmp_path / "mark"
        spoil(path, damage, mark)
        before = files(tmp_path)
        found = outcome(reader, path)
        assert not mark.exists(), damage
        if damage not in reader.accepts.split():
            assert found in ({"nothing", "refused"} if reader.forgiving else {"refused"}), (damage, found)
            assert files(tmp_path) == before, damage


def pieces(data: bytes, count: int) -> Iterator[bytes]:
    """Yield a file cut short at many places."""
    chance = random.Random(0)
    # The ends of some kinds are not missed: a line's end, the last mark of an image.
    for length in sorted({1, 3, 7, *(chance.randrange(len(data) - 16) for _ in range(count))}):
        yield data[:length]


def flipped(data: bytes, count: int) -> Iterator[bytes]:
    """Yield a file with single bytes changed: at both ends, where archives have their headers, and in between."""
    chance = random.Random(0)
    ends = [*range(min(40, len(data))), *range(max(0, len(data) - 80), len(data))]
    for place in [*chance.sample(ends, min(count, len(ends))), *(chance.randrange(len(data)) for _ in range(count))]:
        yield data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]


SLOW = "result"
CHECKED = (".npz", ".pt2")
"""Kinds of files with checksums."""


@pytest.mark.parametrize("kind", READERS)
def test_parts_and_flipped_bits(kind: str, tmp_path: Path) -> None:
    reader = READERS[kind]
    path = reader.made(tmp_path)
    whole = path.read_bytes()
    found, count = [], 5 if kind == SLOW else 25
    for part, make in ((True, pieces), (False, flipped)):
        for data in make(whole, count):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            found.append(outcome(reader, path))
            assert not part or found[-1] != "read", len(data)
    if path.suffix in CHECKED:
        assert found.count("read") < len(found) // 3


HEADED = [kind for kind, each in READERS.items() if each.name.endswith(".json")] + ["ranges", "sensitivity", "rounding"]
"""Kinds of files that say which kind and version they are."""
TABLES = [kind for kind, each in READERS.items() if each.name.endswith(".npz")]


def header(path: Path) -> Any:
    return json.loads(str(read_arrays(path)["header"]) if path.suffix == ".npz" else path.read_text())


def put_header(path: Path, text: str) -> None:
    if path.suffix == ".npz":
        write_arrays(path, read_arrays(path) | {"header": np.array(text.encode("utf-8", "replace").decode())})
    else:
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("change", [{"version": 99}, {"version": "1"}, {"version": None}, {"kind": "list"}])
@pytest.mark.parametrize("kind", HEADED)
def test_another_version_or_kind(kind: str, change: dict[str, object], tmp_path: Path) -> None:
    path = READERS[kind].made(tmp_path)
    put_header(path, json.dumps(header(path) | change))
    assert outcome(READERS[kind], path) in ("refused", "nothing")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
@pytest.mark.parametrize("kind", HEADED)
def test_numbers_in_text_that_are_not_finite(kind: str, number: str, tmp_path: Path) -> None:
    path = READERS[kind].made(tmp_path)
    put_header(path, json.dumps(header(path) | {"more": "here"}).replace('"here"', number))
    assert outcome(READERS[kind], path) in ("refused", "nothing")


@pytest.mark.parametrize("kind", TABLES)
def test_numbers_in_arrays_that_are_not_finite(kind: str, tmp_path: Path) -> None:
    reader = READERS[kind]
    arrays = read_arrays(reader.made(tmp_path))
    for name in {name for name, array in arrays.items() if array.dtype.kind == "f"}:
        path = reader.made(tmp_path)
        write_arrays(path, arrays | {name: arrays[name] * np.nan})
        assert outcome(reader, path) == ("read" if name == reader.nan else "refused"), name


ODD: list[Any] = [None, True, -1, 0, 1, 2**63, 10**200, 1e308, -1e-320, 0.5, "", "x", "../../x", "/etc/passwd", "\0"]
ODD += ["a" * 5000, "W4A8", "W99A8", "<script>", "\ud800", "re:(a+)+", [], {}, [[]], [None], {"a": 1}, ["W4A8"]]


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to every value of a document."""
    if not isinstance(document, dict | list):
        return [path]
    inner = document.items() if isinstance(document, dict) else list(enumerate(document))[:3]
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, document: Any) -> str:
    """Draw a document with one value, key or byte changed, as text."""
    made = copy.deepcopy(document)
    path = draw(st.sampled_from([place for place in places(made) if place]))
    owner = made
    for key in path[:-1]:
        owner = owner[key]
    way = draw(st.sampled_from(["value", "value", "gone", "key", "text"]))
    if way == "value":
        owner[path[-1]] = draw(st.sampled_from(ODD))
    elif way == "gone" or (way == "key" and isinstance(owner, list)):
        owner.pop(path[-1])
    elif way == "key":
        owner[draw(st.sampled_from(["x", "../y", "\0", "choices"]))] = owner.pop(path[-1])
    text = json.dumps(made)
    if way == "text":
        start = draw(st.integers(0, len(text)))
        twist = draw(st.sampled_from(["", '"kind": "plan", ', "[" * 5000, "1" * 5000, "NaN", "1e999", "\ufeff", "}"]))
        text = text[:start] + twist + text[start + draw(st.integers(0, 3)) :]
    return text


def read_changed(kind: str, folder: Path, data: st.DataObject) -> None:
    path = READERS[kind].made(folder)
    put_header(path, data.draw(changed(header(path))))
    assert outcome(READERS[kind], path)


@pytest.mark.parametrize("kind", [kind for kind in HEADED if kind != SLOW])
@settings(FUZZ)
@given(data=st.data())
def test_any_change_of_a_document(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    read_changed(kind, tmp_path, data)


@settings(FUZZ, max_examples=max(10, FUZZ.max_examples // 6))
@given(data=st.data())
def test_any_change_of_a_result(tmp_path: Path, data: st.DataObject) -> None:
    read_changed(SLOW, tmp_path, data)


ODD_ARRAYS = [
    np.zeros(0),
    np.array("x"),
    np.array("[" * 10**5),
    np.array("{}"),
    np.full((3, 3), np.nan),
    np.zeros((1,) * 20),
]
ODD_ARRAYS += [np.array(True), np.array(1j), np.full(2, -(2**62)), np.array(b"x"), np.array("2020-01-01", dtype="M8")]


@pytest.mark.parametrize("kind", TABLES)
@settings(FUZZ)
@given(data=st.data())
def test_any_change_of_an_array(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    path = READERS[kind].made(tmp_path)
    arrays = read_arrays(path)
    key = data.draw(st.sampled_from(sorted(arrays)))
    arrays[key] = data.draw(st.sampled_from(ODD_ARRAYS))
    write_arrays(path, arrays)
    assert outcome(READERS[kind], path)


@FUZZ
@given(data=st.data())
def test_any_change_of_an_onnx_model(tmp_path: Path, data: st.DataObject) -> None:
    """Sizes, names, types, places of weights and single bytes of a model are changed."""
    reader = READERS["ONNX model"]
    path = reader.made(tmp_path)
    model = onnx.load_model(path)
    tensor = data.draw(st.sampled_from(list(model.graph.initializer)))
    node = data.draw(st.sampled_from(list(model.graph.node)))
    text = data.draw(st.sampled_from(["", "x", "\0", "../../etc/passwd", "</script>", "a" * 5000]))
    way = data.draw(st.sampled_from(["dims", "type", "place", "node", "domain", "bytes", "edge"]))
    if way == "dims":
        tensor.dims[:] = data.draw(st.sampled_from([[2**62], [-1], [0], [10**12, 10**12], [1] * 200]))
    elif way == "type":
        tensor.data_type = data.draw(st.integers(-1, 60))
    elif way == "place":
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=text)
    elif way == "node":
        node.op_type = node.name = text
    elif way == "domain":
        model.opset_import.add(domain=text, version=data.draw(st.integers(-(2**63), 2**63 - 1)))
    elif way == "edge":
        node.input.append(text)
        node.output[0] = node.input[0]
    raw = bytearray(model.SerializeToString())
    if way == "bytes":
        for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=5)):
            raw[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    assert outcome(reader, path)
