"""Exported programs on disk: `.pt2` files, written without the one part that torch pickles."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxquant.core.errors import FileFormatError, OutputError, first_line
from fxquant.core.storage.files import atomic_path
from fxquant.core.storage.pt2_audit import MODEL, audit

WRITER_OWN = (".data/", "version", "byteorder")
"""Entries that torch's writer adds by itself."""
READER_LOG = "torch._export.serde.serialize"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StoredProgram:
    """An exported program as a `.pt2` file gives it back, and the description that it came from.

    A program is not the same after a file: sizes are counted by another input, constants become attributes. So a result
    is made from what was read, and the same description is what is written, however often the graph was used between.

    Args:
        exported: the program.
        description: its graph, as the file has it; empty where torch cannot write the program.
    """

    exported: ExportedProgram
    description: bytes

    @staticmethod
    def of(exported: ExportedProgram) -> StoredProgram:
        """Write a program to memory and read it back, its weights shared; without a description if torch cannot."""
        # Weights do not enter the description: one number stands for all of each.
        bare = _bare(exported)
        bare._state_dict = {name: _one_number(value) for name, value in exported.state_dict.items()}
        try:
            stream = _written(bare)
            description = _record(stream)
            again = _read(stream)
        except Exception as error:
            log.warning("the model cannot be written as .pt2 (%s): its result cannot be saved", first_line(error))
            return StoredProgram(exported, b"")
        again.state_dict.update(exported.state_dict)
        again.constants.update(exported.constants)
        return StoredProgram(again, description)

    @staticmethod
    def load(path: Path) -> StoredProgram:
        """Read a `.pt2` file that runs nothing but registered operators.

        Raises:
            FileFormatError: missing, damaged, not an exported program, or with parts that would run code on loading.
        """
        if not path.is_file():
            raise FileFormatError(f"cannot read {path}: {'it is no plain file' if path.exists() else 'no such file'}")
        try:
            # One open file for all: what was looked at is what is loaded.
            with path.open("rb") as stream:
                audit(stream, path)
                stream.seek(0)
                description = _record(stream)
                return StoredProgram(_read(stream), description)
        except FileFormatError:
            raise
        except Exception as error:
            raise FileFormatError(
                f"{path} is not an intact exported program ({first_line(error)}); export it again"
            ) from error

    def save(self, path: Path) -> None:
        """Write what `load` reads, without example inputs: torch pickles them, and nothing here reads them.

        Raises:
            OutputError: the path cannot be written, or torch cannot write the program.
        """
        try:
            # Into memory first: torch's own writer ends the whole process (std::terminate) where the disk is full.
            stream = _written(_bare(self.exported))
        except Exception as error:
            raise OutputError(
                f"{path} cannot be written: torch cannot store this model ({first_line(error)})"
            ) from error
        if self.description and _record(stream) != self.description:
            stream = _with_description(stream, self.description)
        with atomic_path(path) as temporary:
            temporary.write_bytes(stream.getbuffer())


def load_exported(path: Path) -> ExportedProgram:
    """Read the program of a `.pt2` file; see `StoredProgram.load`."""
    return StoredProgram.load(path).exported


def _bare(exported: ExportedProgram) -> ExportedProgram:
    # The caller may own the program, so a shallow copy forgets the example inputs.
    bare = copy.copy(exported)
    bare.example_inputs = None
    return bare


def _one_number(value: Tensor) -> Tensor:
    one = torch.zeros((), dtype=value.dtype).expand(value.shape)
    return nn.Parameter(one, value.requires_grad) if isinstance(value, nn.Parameter) else one


def _written(exported: ExportedProgram) -> io.BytesIO:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(exported, stream)
    stream.seek(0)
    return stream


def _read(stream: IO[bytes]) -> ExportedProgram:
    notes = logging.getLogger(READER_LOG)
    level = notes.level
    # It warns of sizes that the description bounds and does not use, which torch's own writer leaves there.
    notes.setLevel(logging.ERROR)
    try:
        return torch.export.load(stream)
    finally:
        notes.setLevel(level)


def _record(stream: IO[bytes]) -> bytes:
    """Return the description that an archive holds; the stream is where it was."""
    description: bytes = torch._C.PyTorchFileReader(stream).get_record(MODEL)
    stream.seek(0)
    return description


def _with_description(stream: io.BytesIO, description: bytes) -> io.BytesIO:
    """Return a copy of an archive with another description."""
    reader, made = torch._C.PyTorchFileReader(stream), io.BytesIO()
    writer = torch._C.PyTorchFileWriter(made)
    writer.set_min_version(6)
    for name in reader.get_all_records():
        if not name.startswith(WRITER_OWN):
            data = description if name == MODEL else reader.get_record(name)
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return made
