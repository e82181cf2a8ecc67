"""Exported programs on disk: `.pt2` files, written without the one part that torch pickles."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import torch
from torch.export import ExportedProgram

from fxquant.core.errors import FileFormatError, first_line
from fxquant.core.storage.files import atomic_path
from fxquant.core.storage.pt2_audit import audit


def load_exported(path: Path) -> ExportedProgram:
    """Read a `.pt2` file that runs nothing but registered operators.

    Raises:
        FileFormatError: missing, damaged, not an exported program, or with parts that would run code on loading.
    """
    if not path.is_file():
        raise FileFormatError(f"cannot read {path}: {'it is no plain file' if path.exists() else 'no such file'}")
    try:
        # One open file for both: what was looked at is what is loaded.
        with path.open("rb") as stream:
            audit(stream, path)
            stream.seek(0)
            return torch.export.load(stream)
    except FileFormatError:
        raise
    except Exception as error:
        raise FileFormatError(
            f"{path} is not an intact exported program ({first_line(error)}); export it again"
        ) from error


def save_exported(exported: ExportedProgram, path: Path) -> None:
    """Write a program, without its example inputs: torch pickles them, and nothing here reads them.

    Raises:
        OutputError: the path cannot be written.
    """
    # The caller may own the program, so a shallow copy forgets them.
    bare = copy.copy(exported)
    bare.example_inputs = None
    # Into memory first: torch's own writer ends the whole process (std::terminate) where the disk is full.
    stream = io.BytesIO()
    torch.export.save(bare, stream)
    with atomic_path(path) as temporary:
        temporary.write_bytes(stream.getbuffer())
