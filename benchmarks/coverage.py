"""Which architectures can be captured, quantized and run? Uniform W8A8 of the data folder's networks and of timm's.

`python -m benchmarks.coverage [NAME ...] [--limit SECONDS] [--memory GB] [--again | --kept]`: every name is
SOURCE:NAME, the sources those of `benchmarks.coverage_sources`; without names those of `coverage_models.txt` here.
Each runs in a process of its own (`benchmarks.coverage_model`) with a limit on time and memory, and is kept when it
is done: the same command continues where it was stopped, `--again` measures again. Without names the JSON and the
tables of `docs/zoo.md` are written; `--kept` writes them of what is there, and of the JSON's rows for all others.
Models of packages that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import signal
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.coverage_model import measure
from benchmarks.coverage_sources import CALIBRATION_IMAGES, FREE_SIZE, SEED, SOURCES, TEST_IMAGES, import_sources
from benchmarks.report_table import RESULTS, write
from fxquant.core.errors import FileFormatError
from fxquant.core.storage import read_json, write_json

LIST = Path(__file__).with_name("coverage_models.txt")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "zoo.md"
FOLDER = Path(tempfile.gettempdir()) / "fxquant-coverage"

Row = dict[str, Any]


def sections() -> dict[str, list[str]]:
    """Return the names of the list by section, comments left out."""
    found: dict[str, list[str]] = {}
    for line in LIST.read_text(encoding="utf-8").splitlines():
        title = line.strip().removeprefix("[").removesuffix("]") if line.startswith("[") else ""
        if title:
            found[title] = []
        elif found:
            found[next(reversed(found))] += line.partition("#")[0].split()
    return found


def listed() -> list[str]:
    """Return the names of all sections."""
    return [name for names in sections().values() for name in names]


def kept(name: str) -> Row | None:
    """Return the row of an earlier run, None where there is none."""
    try:
        row: Row = read_json(_place(name), "coverage row", 1)["row"]
    except FileFormatError:
        return None
    return row


def written() -> dict[str, Row]:
    """Return the rows of the JSON by model."""
    with suppress(FileFormatError):
        rows: list[Row] = read_json(RESULTS / "coverage.json", "benchmark", 1)["rows"]
        return {row["model"]: row for row in rows}
    return {}


def _place(name: str) -> Path:
    return FOLDER / f"{name.replace(':', '-')}.json"


def measured(name: str, limit: float, memory: float) -> Row:
    """Return the row of one model, run in its own process.

    Args:
        name: the model.
        limit: seconds it may take.
        memory: GB of data it may allocate.
    """
    # A fork has everything imported already; nothing runs on other threads here.
    forking = multiprocessing.get_context("fork")
    reading, writing = forking.Pipe(duplex=False)
    worker = forking.Process(target=_work, args=(name, int(memory * 1e9), writing))
    worker.start()
    writing.close()
    row: Row | None = None
    if reading.poll(limit):
        # A process that died leaves its end closed, and nothing to read.
        with suppress(EOFError):
            row = reading.recv()
    else:
        worker.kill()
    worker.join()
    if row is not None:
        return row
    why = f"took more than {limit:g} s" if worker.exitcode == -signal.SIGKILL else f"ended with {worker.exitcode}"
    return {"model": name, "failed": f"process: {why}", "refused clearly": False}


def _work(name: str, memory: int, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    answer.send(measure(name))


COLUMNS: dict[str, Callable[[Row], object]] = {
    "model": lambda row: f"`{row['model']}`",
    "pixels": lambda row: row.get("pixels"),
    "captured": lambda row: "yes" if row.get("captured") else "no",
    "layers on integers": lambda row: f"{row['integer']} of {row['layers']}" if "layers" in row else None,
    "ONNX Runtime": lambda row: _ran(row, "onnx"),
    "fx_int8": lambda row: _ran(row, "fx_int8"),
    "in float": lambda row: _in_float(row),
    "dB to float": lambda row: row.get("SQNR dB simulated to float"),
    "dB, ONNX": lambda row: row.get("SQNR dB onnx to simulated"),
    "dB, fx_int8": lambda row: row.get("SQNR dB fx_int8 to simulated"),
    "s": lambda row: row.get("seconds"),
    "peak MB": lambda row: row.get("peak MB"),
}
"""Columns of the table in `docs/zoo.md`."""


def _ran(row: Row, runtime: str) -> str:
    if not row.get(f"{runtime} runs"):
        return "no"
    return f"{row[f'{runtime} integer']} on integers"


def _in_float(row: Row) -> str:
    """Return why work stayed in float, products of two activations, which do everywhere, by their number only."""
    products = row.get("products in float", 0)
    found = [f"{products} products"] if products else []
    found += [f"skipped: {row['skipped']}"] if "skipped" in row else []
    found += [f"{count} x {why}" for why, count in row.get("in float", {}).items() if "product of two" not in why]
    return "; ".join([*found, *([row["failed"]] if "failed" in row else [])]) or "nothing"


def _versions() -> dict[str, str]:
    """Return the versions of the packages that models come from, as far as they are installed."""
    packages = {source.install for source in SOURCES.values()} - {""}
    known = {dist.metadata["Name"].replace("_", "-"): dist.version for dist in metadata.distributions()}
    return {name: known[name] for name in sorted(packages & known.keys())}


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Return the rows as a table of markdown."""
    lines = [" | ".join(COLUMNS), "|".join("---" for _ in COLUMNS)]
    for row in rows:
        cells = (tell(row) for tell in COLUMNS.values())
        lines.append(" | ".join("-" if cell is None else str(cell).replace("|", "/") for cell in cells))
    return [f"| {line} |" if "---" not in line else f"|{line}|" for line in lines]


def into_page(rows: Sequence[Row]) -> None:
    """Put a table for each section behind the last heading of the page."""
    heading = "## Every model\n"
    text = PAGE.read_text(encoding="utf-8").partition(heading)[0] + heading
    for title, names in sections().items():
        members = [row for row in rows if row["model"] in names]
        if members:
            text += "\n".join(["", f"### {title}", "", *table_lines(members), ""])
    PAGE.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not kept yet, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models; all of the list where none is named")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for each model")
    parser.add_argument("--memory", type=float, default=8.0, help="GB for each model")
    parser.add_argument("--again", action="store_true", help="measure again what is kept")
    parser.add_argument("--kept", action="store_true", help="measure nothing: write what has been kept so far")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    import_sources()
    for name in () if chosen.kept else chosen.names or listed():
        row = None if chosen.again else kept(name)
        if row is None:
            row = measured(name, chosen.limit, chosen.memory)
            if "skipped" not in row:
                write_json(_place(name), "coverage row", 1, {"row": row})
        shown = (
            row.get("failed") or row.get("skipped") or f"{row['integer']} of {row['layers']} layers, {row['seconds']} s"
        )
        print(f"{name}: {shown}", flush=True)
    if chosen.names:
        return
    others = written() if chosen.kept else {}
    rows = [row for row in (kept(name) or others.get(name) for name in listed()) if row is not None]
    passed = [row for row in rows if row.get("onnx runs") and row.get("fx_int8 runs")]
    meta = {
        "precision": "W8A8, every layer",
        "seed": SEED,
        "calibration images": CALIBRATION_IMAGES,
        "test images": TEST_IMAGES,
        "pixels where the network takes any": FREE_SIZE,
        "seconds allowed": chosen.limit,
        "GB allowed": chosen.memory,
        **_versions(),
        "models": len(rows),
        "ran in both runtimes": len(passed),
        "layers": sum(row.get("layers", 0) for row in rows),
        "layers on integers": sum(row.get("integer", 0) for row in rows),
    }
    write("coverage", rows, meta)
    into_page(rows)


if __name__ == "__main__":
    main()
