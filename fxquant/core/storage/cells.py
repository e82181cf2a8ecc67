"""Resumable measurements: one atomic file per cell, refused if it was made for another model, data or settings.

Every file carries the digest of what it depends on, so a cell can be checked on its own. Two processes
that measure the same cell write the same numbers and the last one stays: no lock is needed. A cell
that does not read back whole (a power cut) is measured again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxquant.core.errors import FileFormatError
from fxquant.core.storage.codecs import read_arrays, read_json, text_digest, write_arrays, write_json_once

FORMAT_VERSION = 2
"""Raised when the same identity would give other numbers: older cells are refused."""

HEADER = "identity.json"
STAMP = "_identity"
"""Name of the array in each cell that holds the digest of its identity."""

Arrays = dict[str, NDArray[Any]]

log = logging.getLogger(__name__)


class ScoreStore:
    """Keeps cells (named groups of arrays) in memory, and in a folder if there is one.

    A killed run loses at most the cell under way: each cell is one file that appears whole or not at all.

    Args:
        folder: where to keep the cells; None for memory only.
        identity: field -> digest of what the cells depend on (model, data, settings).

    Raises:
        FileFormatError: the folder holds cells of another model, data or settings; the message names the field.
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, str]) -> None:
        self.folder = folder
        #: digest of the identity, carried by every cell
        self.digest = text_digest(json.dumps([FORMAT_VERSION, dict(identity)], sort_keys=True))
        self._cells: dict[str, Arrays] = {}
        #: keys of cells that were put here, not found in the folder
        self.added: set[str] = set()
        if folder is None:
            return
        header = folder / HEADER
        if not header.exists():
            self._refuse_strangers(folder)
            write_json_once(header, "scores", FORMAT_VERSION, dict(identity))
        # Read back even if just written: another process may have been first.
        try:
            known = read_json(header, "scores", FORMAT_VERSION)
        except FileFormatError as error:
            raise FileFormatError(f"{error}; use another workdir, or remove {folder} to start again") from error
        found = {name: value for name, value in known.items() if name not in ("kind", "version")}
        changed = [name for name in {**identity, **found} if found.get(name) != identity.get(name)]
        if changed:
            raise FileFormatError(
                f"scores in {folder} were made with another {', '.join(changed)}; "
                "use another workdir, or remove that folder to start again"
            )

    def get(self, key: str) -> Arrays | None:
        """Return a finished cell, None if it has yet to be measured, or measured again because its file is damaged.

        Raises:
            FileFormatError: the file in its place was made with another model, data or settings.
        """
        if key not in self._cells and self.folder is not None:
            path = self.folder / f"{key}.npz"
            cell = _read(path)
            if cell is not None:
                if _stamp(cell) != self.digest:
                    raise FileFormatError(
                        f"{path} was made with another model, data or settings than {self.folder / HEADER} tells; "
                        "remove that file to have it measured again, or use another workdir"
                    )
                self._cells[key] = {name: array for name, array in cell.items() if name != STAMP}
        return self._cells.get(key)

    def put(self, key: str, cell: Mapping[str, NDArray[Any] | float]) -> Arrays:
        """Keep a cell and return it.

        Raises:
            OutputError: the folder cannot be written.
        """
        arrays = {name: np.asarray(value) for name, value in cell.items()}
        self._cells[key] = arrays
        self.added.add(key)
        if self.folder is not None:
            # A cell is one of thousands, and one that a power cut damaged is found and measured again.
            write_arrays(self.folder / f"{key}.npz", {**arrays, STAMP: np.array(self.digest)}, durable=False)
        return arrays

    def _refuse_strangers(self, folder: Path) -> None:
        # Without the header nothing tells which field differs, but each cell tells whether it is ours.
        for path in sorted(folder.glob("[!.]*.npz")):
            cell = _read(path)
            if cell is not None and _stamp(cell) != self.digest:
                raise FileFormatError(
                    f"{path} was made with another model, data or settings, and {HEADER}, which would tell which of "
                    "them changed, is missing; use another workdir, or remove that folder to start again"
                )


def _read(path: Path) -> Arrays | None:
    """Return the arrays of a cell's file, None if there is none or it is damaged."""
    if not path.exists():
        return None
    try:
        return read_arrays(path)
    except FileFormatError as error:
        log.warning("a damaged score is measured again: %s", error)
        return None


def _stamp(cell: Mapping[str, NDArray[Any]]) -> str:
    return str(cell[STAMP]) if STAMP in cell else ""
