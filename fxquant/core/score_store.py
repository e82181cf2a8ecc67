"""A folder of finished measurements: written once each, atomically, refused when made for something else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxquant.core.errors import FileFormatError
from fxquant.core.store import read_arrays, read_json, write_arrays, write_json

FORMAT_VERSION = 1

Arrays = dict[str, NDArray[Any]]


class ScoreStore:
    """Keeps cells (named groups of arrays) in memory, and in a folder if there is one.

    A killed run loses at most the cell under way: each cell is one file that appears whole or not at all.

    Args:
        folder: where to keep the cells; None for memory only.
        identity: field -> digest of what the cells depend on (model, data, settings).

    Raises:
        FileFormatError: the folder holds cells of another model, data or settings; the message names the field.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, str]) -> None:
        self.folder = folder
        self._cells: dict[str, Arrays] = {}
        if folder is None:
            return
        header = folder / "identity.json"
        if header.exists():
            known = read_json(header, "scores", FORMAT_VERSION)
            changed = [name for name, value in identity.items() if known.get(name) != value]
            if changed:
                raise FileFormatError(
                    f"scores in {folder} were made with another {', '.join(changed)}; "
                    "use another workdir, or remove that folder to start again"
                )
        else:
            write_json(header, "scores", FORMAT_VERSION, dict(identity))

    def get(self, key: str) -> Arrays | None:
        """Return a finished cell, None if it has yet to be measured."""
        if key not in self._cells and self.folder is not None:
            path = self.folder / f"{key}.npz"
            if path.exists():
                self._cells[key] = read_arrays(path)
        return self._cells.get(key)

    def put(self, key: str, cell: Mapping[str, NDArray[Any] | float]) -> Arrays:
        """Keep a cell and return it.

        Raises:
            OutputError: the folder cannot be written.
        """
        arrays = {name: np.asarray(value) for name, value in cell.items()}
        self._cells[key] = arrays
        if self.folder is not None:
            write_arrays(self.folder / f"{key}.npz", arrays)
        return arrays
