from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant.core.errors import FileFormatError, OutputError
from fxquant.core.storage import (
    atomic_path,
    pack_arrays,
    read_array,
    read_arrays,
    read_json,
    read_tensors,
    tensor_digest,
    text_digest,
    unpack_arrays,
    write_arrays,
    write_json,
    write_json_once,
    write_tensors,
)


def damaged(data: bytes, flips: int) -> Iterator[bytes]:
    """Yield a file cut short at many places, and with single bytes changed."""
    chance = random.Random(0)
    for length in sorted({0, 1, 3, 4, 7, len(data) - 1, *(chance.randrange(len(data)) for _ in range(20))}):
        yield data[:length]
    # Headers sit at both ends of archives; random places in between meet the payload.
    places = [*range(min(40, len(data))), *range(max(0, len(data) - 80), len(data))]
    for place in [*places, *(chance.randrange(len(data)) for _ in range(flips))]:
        yield data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]
    yield b"\0" * len(data)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: BaseException) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


def is_refused(read: Callable[[Path], object], path: Path) -> bool:
    """Whether a reader refuses a file; any other error fails the test."""
    try:
        read(path)
    except FileFormatError:
        return True
    return False


def test_json_round_trip_is_versioned(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, "plan", 3, {"x": [1, 2.5, None], "name": "größe"})
    assert read_json(path, "plan", 3) == {"kind": "plan", "version": 3, "x": [1, 2.5, None], "name": "größe"}
    with pytest.raises(FileFormatError, match="is not a scores file"):
        read_json(path, "scores", 3)
    with pytest.raises(FileFormatError, match=r"format version 3, this fxquant reads 4; an older .*run again"):
        read_json(path, "plan", 4)
    assert names_in(path.parent) == ["a.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '"plan"', "null", "\ufeff{}", '{"kind": "plan"}', "1" * 5000, "[" * 10**5]
)
def test_json_that_is_none_of_ours(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=r"a\.json"):
        read_json(path, "plan", 1)


def test_binary_where_json_is_expected(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(FileFormatError, match="not valid JSON"):
        read_json(path, "plan", 1)


@pytest.mark.parametrize("read", [lambda p: read_json(p, "plan", 1), read_arrays, read_tensors])
def test_missing_files_and_folders(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(FileFormatError, match="cannot read"):
        read(tmp_path / "absent")
    with pytest.raises(FileFormatError):
        read(tmp_path)


def test_arrays_round_trip(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array("text"), "file": np.zeros(0)}
    write_arrays(tmp_path / "a.npz", arrays)
    back = read_arrays(tmp_path / "a.npz")
    assert set(back) == set(arrays)
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)


def test_arrays_of_objects_are_neither_written_nor_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(FileFormatError, match="not an intact npz"):
        read_arrays(path)


def test_damaged_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = {"a": np.arange(40.0), "b": np.array("text")}
    write_arrays(path, arrays)
    refused = 0
    for piece in damaged(path.read_bytes(), 60):
        path.write_bytes(piece)
        refused += is_refused(read_arrays, path)
    assert refused > 60


def test_packed_arrays_are_the_file(tmp_path: Path) -> None:
    arrays = {"file": np.arange(3.0), "n": np.array(7), "text": np.array("abc")}
    write_arrays(tmp_path / "a.npz", arrays)
    packed = pack_arrays(arrays)
    found = unpack_arrays(packed)
    assert list(found) == list(arrays)
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert len(packed) == (tmp_path / "a.npz").stat().st_size
    for piece in (b"", packed[:-30], packed[:40]):
        with pytest.raises(FileFormatError, match="not an intact npz"):
            unpack_arrays(piece)


@pytest.mark.parametrize("links", [True, False])
def test_of_several_writers_the_first_one_stays(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", none)
    assert write_json_once(tmp_path / "deep" / "a.json", "k", 1, {"n": 1})
    assert not write_json_once(tmp_path / "deep" / "a.json", "k", 1, {"n": 2})
    assert read_json(tmp_path / "deep" / "a.json", "k", 1)["n"] == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.json"]


def test_tensors_round_trip_and_share_no_memory(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    tensors = {"a": weight, "b": weight, "c": weight.t(), "d": torch.zeros(0, 2, dtype=torch.int8)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    back = read_tensors(tmp_path / "t.safetensors")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_damaged_tensors(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.arange(40.0)})
    refused = 0
    for piece in damaged(path.read_bytes(), 30):
        path.write_bytes(piece)
        refused += is_refused(read_tensors, path)
    assert refused > 30


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="choose a writable folder"):
        write_json(tmp_path / "file" / "below" / "a.json", "plan", 1, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_arrays(tmp_path / "folder", {"a": np.zeros(1)})
    assert names_in(tmp_path) == ["file", "folder"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, "plan", 1, {"x": 1})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, "plan", 1, {"x": float("nan")})
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    with pytest.raises(OutputError, match="No space left"):
        write_half(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["a.json"]


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "ours", "plan", 1, {})
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_digests_see_names_types_shapes_and_bytes() -> None:
    base = {"w": torch.arange(6.0), "b": torch.tensor(True)}
    digest = tensor_digest(base)
    assert digest == tensor_digest(dict(reversed(base.items())))
    assert digest == tensor_digest({**base, "w": torch.arange(12.0)[::2] / 2})
    others = [
        {"v": base["w"], "b": base["b"]},
        {**base, "w": base["w"].reshape(2, 3)},
        {**base, "w": base["w"].view(torch.int32)},
        {**base, "w": base["w"] + 1e-6},
        {**base, "e": torch.zeros(0)},
    ]
    assert len({digest, *map(tensor_digest, others)}) == 6
    assert text_digest("a") != text_digest("b")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"kind": "plan", "version": 1, "a": {"b": 1, "b": 2}}', "key 'b' is there twice"),
        ('{"kind": "plan", "version": 1, "a": NaN}', "NaN is no JSON number"),
        ('{"kind": "plan", "version": 1, "a": [-Infinity]}', "-Infinity is no JSON number"),
        ('{"kind": "plan", "version": 1, "a": 1e999}', "number 1e999 is out of range"),
        ('{"kind": "plan", "version": 1, "a": ' + "9" * 400 + "}", "is out of range"),
        ('{"kind": "plan", "version": 1, "a": ' + "[" * 10**5, "nested too deeply"),
    ],
)
def test_json_is_strict(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileFormatError, match=told):
        read_json(tmp_path / "a.json", "plan", 1)


def test_one_array(tmp_path: Path) -> None:
    for array in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.zeros((0, 4))):
        np.save(tmp_path / "a.npy", array)
        assert np.array_equal(read_array(tmp_path / "a.npy"), array)
        assert read_array(tmp_path / "a.npy").dtype == array.dtype
    for wrong in (tmp_path, tmp_path / "absent.npy"):
        with pytest.raises(FileFormatError, match="cannot read"):
            read_array(wrong)
