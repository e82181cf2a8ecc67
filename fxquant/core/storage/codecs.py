"""Reading and writing files: atomic, versioned, never pickle, every failure an error of our own tree."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fxquant.core.errors import FileFormatError, OutputError
from fxquant.core.storage.files import UNFINISHED, atomic_path

LONGEST_NUMBER = 300
"""Digits of a whole number in JSON; one of more would not fit a float."""
BOMB_BYTES, BOMB_RATIO = 1 << 28, 200
"""An npz may unpack to this many bytes, or to this many times its own."""


def write_json(path: Path, kind: str, version: int, body: Mapping[str, Any]) -> None:
    """Write `body` with its kind and format version, sorted and indented for people.

    Raises:
        OutputError: the folder cannot be written.
    """
    document = {"kind": kind, "version": version, **body}
    text = json.dumps(document, indent=1, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Read a document that `write_json` wrote.

    Raises:
        FileFormatError: missing, not JSON, of another kind or version.
    """
    _require_file(path)
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise FileFormatError(f"{path} is not valid JSON ({error}); restore it or run again") from error
    return checked_document(document, kind, version, str(path))


def _require_file(path: Path) -> None:
    """Refuse what is no plain file: a pipe or a device may never end."""
    try:
        if not path.is_file():
            raise FileFormatError(f"cannot read {path}: {'it is no plain file' if path.exists() else 'no such file'}")
    except (OSError, ValueError) as error:
        # A name that is too long, or holds a NUL.
        raise FileFormatError(f"cannot read {str(path)!r:.300}: {error}") from error


def parse_json(text: str) -> Any:
    """Return what strict JSON says: no key twice in one object, no NaN or infinity, no number beyond floats.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_number, parse_int=_whole
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"number {digits[:40]} is out of range")
    return value


def _whole(digits: str) -> int:
    value = int(digits) if len(digits) <= LONGEST_NUMBER else None
    if value is None:
        raise ValueError(f"number {digits[:40]}.. is out of range")
    return value


def checked_document(document: object, kind: str, version: int, origin: str) -> dict[str, Any]:
    """Return the document if it is an object of the given kind and version.

    Raises:
        FileFormatError: it is not.
    """
    if not isinstance(document, dict) or document.get("kind") != kind:
        found = document.get("kind") if isinstance(document, dict) else type(document).__name__
        raise FileFormatError(f"{origin} is not a {kind} file (found {found!r})")
    if document.get("version") != version:
        raise FileFormatError(
            f"{origin} has {kind} format version {document.get('version')!r}, this fxquant reads {version}; "
            f"{_other_version(document.get('version'), version)}"
        )
    return document


def _other_version(found: object, known: int) -> str:
    """Return what to do about a file of another format version."""
    if isinstance(found, int) and found > known:
        return "a newer fxquant wrote it: use that one, or run again with this one into another folder"
    return "an older fxquant wrote it, if it is ours at all: run again with this one into another folder"


def write_json_once(path: Path, kind: str, version: int, body: Mapping[str, Any]) -> bool:
    """Write as `write_json` does unless there is such a file, and return whether it was written.

    Of several processes that try at once, one writes and the others find its whole file.

    Raises:
        OutputError: the folder cannot be written.
    """
    handed_over = path.with_name(f"{UNFINISHED}{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        write_json(handed_over, kind, version, body)
    except OutputError as error:
        raise OutputError(str(error).replace(str(handed_over), str(path))) from error
    try:
        os.link(handed_over, path)
    except FileExistsError:
        return False
    except OSError:
        # No hard links here (FAT, some network mounts): as good as it gets without.
        if path.exists():
            return False
        handed_over.replace(path)
    finally:
        handed_over.unlink(missing_ok=True)
    return True


def pack_arrays(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Return named arrays as the bytes of an uncompressed npz."""
    stream = io.BytesIO()
    _write_npz(stream, arrays)
    return stream.getvalue()


def unpack_arrays(packed: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of `pack_arrays`, refusing pickled objects.

    Raises:
        FileFormatError: truncated or not an npz of plain arrays.
    """
    try:
        return _arrays(io.BytesIO(packed), len(packed))
    except Exception as error:
        raise FileFormatError(f"{len(packed)} bytes are not an intact npz of plain arrays ({error})") from error


def _write_npz(target: Path | io.BytesIO, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    # np.savez takes names as keywords, so that an array could not be called `file`; the format is the same.
    with zipfile.ZipFile(target, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=False)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]], durable: bool = True) -> None:
    """Write named arrays as an uncompressed npz.

    Args:
        path: the file to be.
        arrays: by name.
        durable: see `atomic_path`; a damaged npz is found by its checksums.

    Raises:
        OutputError: the folder cannot be written.
    """
    with atomic_path(path, durable) as temporary:
        _write_npz(temporary, arrays)


def _arrays(stream: IO[bytes], size: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of an npz of `size` bytes; of a damaged one anything may be raised."""
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > max(BOMB_BYTES, BOMB_RATIO * size):
            raise ValueError(f"it would unpack to {unpacked} bytes")
        found: dict[str, np.ndarray[Any, Any]] = {}
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            if name in found or name == entry.filename:
                raise ValueError(f"its entry {entry.filename[:100]!r} is there twice or is no array")
            with archive.open(entry) as part:
                found[name] = _array(part, entry.file_size)
        return found


def _array(stream: IO[bytes], size: int) -> np.ndarray[Any, Any]:
    """Return one npy of `size` bytes; what its header claims is believed only as far as there are bytes."""
    version = np.lib.format.read_magic(stream)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in header:
        raise ValueError(f"npy version {version} is unknown")
    shape, by_columns, kind = header[version](stream)
    if kind.hasobject:
        raise ValueError("it holds pickled objects")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * kind.itemsize > size:
        raise ValueError(f"an array of shape {shape} is not in its {size} bytes")
    flat = np.frombuffer(bytearray(stream.read(count * kind.itemsize)), dtype=kind, count=count)
    return flat.reshape(shape[::-1]).T if by_columns else flat.reshape(shape)


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read every array of an npz, refusing pickled objects.

    Raises:
        FileFormatError: missing, truncated or not an npz of plain arrays.
    """
    _require_file(path)
    try:
        with path.open("rb") as stream:
            return _arrays(stream, path.stat().st_size)
    except Exception as error:
        # A damaged archive can fail anywhere in zipfile, zlib and numpy, each with other errors.
        raise FileFormatError(f"{path} is not an intact npz of plain arrays ({error}); run again") from error


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """Read an npy, refusing pickled objects.

    Raises:
        FileFormatError: missing, truncated or not an npy of plain numbers.
    """
    _require_file(path)
    try:
        with path.open("rb") as stream:
            return _array(stream, path.stat().st_size)
    except Exception as error:
        raise FileFormatError(f"{path} is not an intact npy of a plain array ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors.

    Raises:
        OutputError: the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        # safetensors refuses tensors that share memory, as tied weights do; and it tells a full disk by an error of
        # its own, without a number, so the bytes are written here.
        made = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        temporary.write_bytes(save(made))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileFormatError: missing, truncated or not safetensors.
    """
    _require_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FileFormatError(f"{path} is not an intact safetensors file ({error})") from error


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a sha256 over names, shapes, types and bytes of the tensors (16 hex digits)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()[:16]


def text_digest(text: str) -> str:
    """Return the sha256 of a text (16 hex digits)."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
