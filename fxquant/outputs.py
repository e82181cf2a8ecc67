"""The output folder of a command: checked before the work, filled at its end, all files or none."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fxquant.backends import Backend, backend, backends
from fxquant.core.errors import FileFormatError, MissingDependencyError, OptionError
from fxquant.core.facts import Routes, Target
from fxquant.core.storage import OUTPUT, check_writable, finish, only_writer, read_json, staged, sweep, write_json
from fxquant.report import FORMAT_VERSION, write_page
from fxquant.result import Result
from fxquant.routed import ROUTED_FILE

SCORES, ROUNDING = "scores", "rounding"
"""Folders of finished work, from which a run resumes."""


def check_packages(target: str | Path | Target) -> None:
    """Fail before the long work if a package for the outputs is missing.

    Raises:
        MissingDependencyError: jinja2, or a package that the target's backend needs, is not installed.
    """
    backend(target).check_packages()
    try:
        _ = importlib.import_module("jinja2")
    except ImportError as error:
        raise MissingDependencyError('report.html needs jinja2; pip install "fxquant[report]"') from error


@contextmanager
def output_folder(folder: Path, resume: bool = False, writer: bool = True) -> Iterator[Path]:
    """Make a folder and check that it can be written; if the block fails, empty folders made here are removed.

    Args:
        folder: where results will be written.
        resume: accept a folder that already holds a result or scores.
        writer: lock the folder and remove what killed runs left; False for processes that only share the scoring.

    Raises:
        OptionError: the folder holds an earlier result and `resume` is False.
        BusyFolderError: another run is writing to it.
        OutputError: it cannot be written.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with ExitStack() as held:
            check_writable(folder)
            if writer:
                held.enter_context(only_writer(folder))
                _ = finish(folder)
                sweep(folder)
            earlier = [name for name in (SCORES, "result.json") if (folder / name).exists()]
            if earlier and not resume:
                raise OptionError(
                    f"{folder} holds {' and '.join(earlier)} of an earlier run; "
                    "give --resume to continue from its scores and replace its results, or another folder"
                )
            yield folder
    except BaseException:
        for place in missing:
            # Another process may have removed it, or written to it.
            with suppress(OSError):
                place.rmdir()
        raise


def write_outputs(result: Result, folder: Path, extras: Mapping[str, Any] | None = None) -> list[Path]:
    """Write the saved result, the file that its target's runtime reads, `report.html` and `report.json`.

    Everything is made in a folder beside and moved in at the end, so a failure leaves an earlier result as it was.

    Args:
        result: what to write.
        folder: where to; files of an earlier result are replaced or removed.
        extras: measurements for the report.

    Returns:
        The main files.

    Raises:
        OutputError: the folder cannot be written.
        LoweringError: an op has no form in the file.
        MissingDependencyError: a package for the outputs is missing.
    """
    measured, runtime = dict(extras or {}), backend(result.program[Target])
    names = ["plan.json", *([] if runtime.export is None else [runtime.export.file]), "report.html", "report.json"]
    exported = [found.export.file for found in backends().values() if found.export is not None]
    with staged(folder, (*OUTPUT, *exported)) as staging:
        _ = result.save(staging)
        if runtime.export is not None:
            measured |= export(result, runtime, staging / runtime.export.file)
            if Routes in result.program and runtime.export.routes:
                _ = result.routed.to_onnx(staging / ROUTED_FILE)
                names.insert(2, ROUTED_FILE)
        elif runtime.kernels is not None:
            measured["kernels"] = runtime.kernels(result.simulated, None)
        write_reports(result, staging, measured)
    return [folder / name for name in names]


def export(
    result: Result, runtime: Backend, path: Path, options: Mapping[str, object] = MappingProxyType({})
) -> dict[str, Any]:
    """Write the file that a runtime reads and return its bytes, and the kernels of the layers where they are known.

    Args:
        result: whose model to write.
        runtime: a backend that exports.
        path: the file.
        options: those of `runtime.export`, by name.

    Raises:
        OptionError: the runtime's file has no such option, or it does not fit the network.
        OutputError: the path cannot be written.
        LoweringError: an op has no form there.
        MissingDependencyError: a package is not installed.
    """
    assert runtime.export is not None
    kind = runtime.export.options
    if options and kind is None:
        raise OptionError(f"{runtime.export.file} has no options; leave out {', '.join(options)}")
    if kind is not None:
        _ = kind.of(options)
    found: dict[str, Any] = {"bytes_on_disk": runtime.export.write(result.simulated, path, result.metadata, **options)}
    if runtime.kernels is not None:
        found["kernels"] = runtime.kernels(result.simulated, path)
    return found


def layouts() -> dict[str, Backend]:
    """Return what `fxquant export --runtime` may be -> the backend that writes it."""
    found = dict[str, Backend]()
    for name, runtime in backends().items():
        if runtime.export is not None:
            found |= dict.fromkeys(runtime.export.layouts or (name,), runtime)
    return found


def write_reports(result: Result, folder: Path, extras: Mapping[str, Any] | None = None) -> None:
    """Write `report.html` and `report.json`.

    Raises:
        OutputError: the folder cannot be written.
        OptionError: an extra of unknown name.
        MissingDependencyError: jinja2 is not installed.
    """
    data = result.report_data(extras)
    _ = write_page(data, folder / "report.html")
    write_json(folder / "report.json", "report", FORMAT_VERSION, data)


def add_to_report(result: Result, folder: Path, found: Mapping[str, Any]) -> bool:
    """Write the folder's report again with what was measured since, and return whether that was done.

    A folder without a report is left alone.

    Args:
        result: what the folder holds.
        folder: where the report is.
        found: measurements by name, as for `write_reports`; numbers that are not finite are left empty.

    Raises:
        OutputError: the folder cannot be written.
        MissingDependencyError: jinja2 is not installed.
    """
    if not (folder / "report.json").is_file():
        return False
    plain = json.loads(json.dumps(dict(found)), parse_constant=lambda _: None)
    write_reports(result, folder, known_extras(result, folder) | plain)
    return True


def known_extras(result: Result, folder: Path) -> dict[str, Any]:
    """Return what an earlier report of this plan measured; nothing if there is none, or it was about another plan."""
    try:
        document = read_json(folder / "report.json", "report", FORMAT_VERSION)
        reported = {row["name"]: row["choice"] for row in document["layers"]}
        measured = document["measured"]
    except (FileFormatError, KeyError, TypeError):
        # The new report is made from the result; an earlier one only adds measurements.
        return {}
    plan = {name: choice.label for name, choice in result.allocation.choices.items()}
    return dict(measured) if reported == plan and isinstance(measured, dict) else {}
