"""What every benchmark shares: the machine it ran on, its table and JSON file, and fair timing."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from fxquant.core.errors import OptionError
from fxquant.core.storage import write_json

RESULTS = Path(__file__).resolve().parent / "results"

_PACKAGES = ("torch", "numpy", "onnx", "onnxruntime")
_WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds: the median, and the lower and upper quartile around it."""

    median: float
    low: float
    high: float


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, str | int]:
    """Return the CPU model, usable cores, operating system, package versions and UTC date of this run."""
    # A container may be lent fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cell(value: object) -> str:
    if isinstance(value, float):
        # Accuracies keep two decimals; small seconds and divergences keep three significant digits.
        return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"
    return "-" if value is None else str(value)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return the rows as one aligned text table; columns in order of first appearance, numbers to the right."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in [columns, *cells]) for index in range(len(columns))]
    numeric = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]

    def line(values: Sequence[str]) -> str:
        aligned = (
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, cells)])


def write(name: str, rows: Sequence[Mapping[str, object]], meta: Mapping[str, object]) -> Path:
    """Print the rows as a table and write them with `meta` and the environment to `results/<name>.json`.

    Args:
        name: file stem of the result.
        rows: one mapping of column to value per line; values must be JSON-serialisable and finite.
        meta: seeds, limits, data and whatever else is needed to repeat the run.

    Raises:
        OptionError: there are no rows.
        OutputError: the file cannot be written.
    """
    if not rows:
        raise OptionError(f"benchmark {name!r} has no rows; measure something before writing")
    print(table(rows))
    path = RESULTS / f"{name}.json"
    body = {"name": name, "environment": environment(), "meta": dict(meta), "rows": [dict(r) for r in rows]}
    write_json(path, "benchmark", 1, body)
    print(f"written to {path}")
    return path


def interleaved(callables: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Return the timing of each callable, called once per round in a rotating order after two warm-up rounds.

    Interleaving spreads a machine's slow moments over all contestants instead of charging them to one.

    Raises:
        OptionError: nothing to time, or fewer than 2 rounds.
    """
    if not callables or rounds < 2:
        raise OptionError(f"timing needs a callable and rounds >= 2; got {len(callables)}, rounds={rounds}")
    names = list(callables)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-_WARM_UP_ROUNDS, rounds):
        # Rotating keeps any one callable from always inheriting the same neighbour's cache.
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            callables[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    timings = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        timings[name] = Timing(median, low, high)
    return timings
