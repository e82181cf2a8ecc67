from __future__ import annotations

import errno
import os
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


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: BaseException) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


def test_json_round_trip_is_versioned(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, "plan", 3, {"x": [1, 2.5, None], "name": "größe"})
    assert read_json(path, "plan", 3) == {"kind": "plan", "version": 3, "x": [1, 2.5, None], "name": "größe"}
    with pytest.raises(FileFormatError, match="is not a scores file"):
        read_json(path, "scores", 3)
    with pytest.raises(FileFormatError, match=r"format version 3, this fxquant reads 4; an older .*run again"):
        read_json(path, "plan", 4)
    assert names_in(path.parent) == ["a.json"]


def test_arrays_round_trip(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array("text"), "file": np.zeros(0)}
    write_arrays(tmp_path / "a.npz", arrays)
    back = read_arrays(tmp_path / "a.npz")
    assert set(back) == set(arrays)
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)


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
    ("text", "message"),
    [
        ('{"kind": "plan", "version": 1, "a": {"b": 1, "b": 2}}', "key 'b' is there twice"),
        ('{"kind": "plan", "version": 1, "a": NaN}', "NaN is no JSON number"),
        ('{"kind": "plan", "version": 1, "a": [-Infinity]}', "-Infinity is no JSON number"),
        ('{"kind": "plan", "version": 1, "a": 1e999}', "number 1e999 is out of range"),
        ('{"kind": "plan", "version": 1, "a": ' + "9" * 400 + "}", "is out of range"),
        ('{"kind": "plan", "version": 1, "a": ' + "[" * 10**5, "nested too deeply"),
    ],
)
def test_json_is_strict(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_json(tmp_path / "a.json", "plan", 1)


def test_one_array(tmp_path: Path) -> None:
    for array in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.zeros((0, 4))):
        np.save(tmp_path / "a.npy", array)
        assert np.array_equal(read_array(tmp_path / "a.npy"), array)
        assert read_array(tmp_path / "a.npy").dtype == array.dtype
