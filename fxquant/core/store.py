"""Reading and writing files: atomic, versioned, never pickle, every failure an error of our own tree."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fxquant.core.errors import FileFormatError
from fxquant.core.files import UNFINISHED, atomic_path


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
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not valid JSON ({error}); restore it or run again") from error
    return checked_document(document, kind, version, str(path))


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
    write_json(handed_over, kind, version, body)
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
        with np.load(io.BytesIO(packed), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
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


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read every array of an npz, refusing pickled objects.

    Raises:
        FileFormatError: missing, truncated or not an npz of plain arrays.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise FileFormatError(f"cannot read {path}: no such file") from error
    except Exception as error:
        # A damaged archive can fail anywhere in zipfile, zlib and numpy, each with errors of its own.
        raise FileFormatError(f"{path} is not an intact npz of plain arrays ({error}); run again") from error


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
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise FileFormatError(f"cannot read {path}: no such file") from error
    except (OSError, SafetensorError) as error:
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
