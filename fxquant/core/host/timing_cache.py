"""Times on disk, so that no machine measures the same thing twice."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fxquant.core.errors import FxquantError, OptionError, OutputError
from fxquant.core.host.timing import Timing
from fxquant.core.storage import parse_json, text_digest, write_json

KIND, VERSION = "timings", 1
OFF = "off"
"""Value of `FXQUANT_CACHE` that keeps nothing."""


def cache_folder() -> Path | None:
    """Return where times are kept: `FXQUANT_CACHE`, else `fxquant` in the user's cache folder; None where it is "off".

    The user's cache folder is `XDG_CACHE_HOME`, or `~/.cache`.
    """
    asked = os.environ.get("FXQUANT_CACHE", "")
    if asked:
        return None if asked == OFF else Path(asked)
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home else Path.home() / ".cache") / "fxquant"


@dataclass(frozen=True)
class TimingCache:
    """Lists of timings by key, one JSON file for each key and machine: processes can only replace whole files.

    Args:
        folder: where the files are; None keeps nothing.
        belongs: what the times depend on apart from the key; another CPU, runtime or version finds nothing here.
    """

    folder: Path | None
    belongs: Mapping[str, str] = field(default_factory=dict)

    def get(self, key: str, count: int) -> list[Timing] | None:
        """Return the timings of a key, None where they have to be measured.

        A damaged file is reported with a warning and counts as none.

        Args:
            key: what was measured.
            count: number of timings that belong to it, at least 1.
        """
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            document = parse_json(path.read_text(encoding="utf-8"))
            if document["kind"] != KIND or document["version"] != VERSION or document["key"] != key:
                raise OptionError("it holds something else")
            found = [_timing(entry) for entry in document["timings"]]
            if document["belongs"] != dict(self.belongs) or len(found) != count:
                raise OptionError("it belongs to something else")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, FxquantError) as error:
            warnings.warn(f"{path} is damaged ({error}); its times are measured again", stacklevel=2)
            return None
        return found

    def put(self, key: str, timings: Sequence[Timing]) -> None:
        """Keep the timings of a key; a folder that cannot be written is reported with a warning."""
        path = self._path(key)
        if path is None:
            return
        body = {"key": key, "belongs": dict(self.belongs), "timings": [asdict(timing) for timing in timings]}
        try:
            write_json(path, KIND, VERSION, body)
        except OutputError as error:
            # The measurement is in hand; that the next one has to repeat it is no reason to lose it.
            warnings.warn(f"times are not kept: {error}", stacklevel=2)

    def _path(self, key: str) -> Path | None:
        if self.folder is None:
            return None
        owner = text_digest(json.dumps(dict(self.belongs), sort_keys=True))
        return self.folder / "timings" / owner[:16] / f"{text_digest(key)[:32]}.json"


def _timing(entry: Mapping[str, Any]) -> Timing:
    found = Timing(**{name: float(value) for name, value in entry.items()})
    if not all(map(math.isfinite, asdict(found).values())):
        raise OptionError("it holds a time that is not finite")
    return found
