"""The folder a command writes: checked before the work, filled at its end, whole or not at all."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fxquant.backends.onnx_options import OnnxOptions
from fxquant.backends.onnx_qdq import onnx_module
from fxquant.core.errors import FileFormatError, MissingDependencyError, OptionError, OutputError
from fxquant.core.settings import Settings
from fxquant.core.files import atomic_path
from fxquant.core.store import read_json, write_json
from fxquant.report.content import FORMAT_VERSION, content
from fxquant.report.html import render
from fxquant.result import Result

OWN_FILES: tuple[str, ...] = ("result.json", "plan.json", "ranges.npz", "model.pt2", "held_out.safetensors")
OWN_FILES += ("model.onnx", "model.onnx.data", "report.html", "report.json")
"""Files of a result, besides one `sensitivity_<estimator>.npz` for each estimator; the first says that it is whole."""

SCORES = "scores"


def check_packages(target: str) -> None:
    """Fail before the long work if a package for the outputs is missing.

    Raises:
        MissingDependencyError: jinja2, or for the target "onnxruntime" the ONNX packages, are not installed.
    """
    if target == "onnxruntime":
        _ = onnx_module("onnx_session")
    try:
        _ = importlib.import_module("jinja2")
    except ImportError as error:
        raise MissingDependencyError('report.html needs jinja2; pip install "fxquant[report]"') from error


@contextmanager
def output_folder(folder: Path, resume: bool = False) -> Iterator[Path]:
    """Make a folder and try to write to it; folders made here that are still empty go away if the block fails.

    Args:
        folder: where results will be written.
        resume: take a folder that already holds a result or scores.

    Raises:
        OptionError: the folder holds an earlier result and `resume` is False.
        OutputError: it cannot be written.
    """
    earlier = [name for name in (SCORES, "result.json") if (folder / name).exists()]
    if earlier and not resume:
        raise OptionError(
            f"{folder} holds {' and '.join(earlier)} of an earlier run; "
            "give --resume to go on with its scores and replace its results, or another folder"
        )
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with atomic_path(folder / ".writable"):
            pass
        # Several processes may try at once.
        (folder / ".writable").unlink(missing_ok=True)
        yield folder
    except BaseException:
        for place in missing:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
        raise


def write_outputs(result: Result, folder: Path, extras: Mapping[str, Any] | None = None) -> list[Path]:
    """Write the saved result, `model.onnx` for the target "onnxruntime", `report.html` and `report.json`.

    Everything is made in a folder beside and moved in at the end, so a failure leaves an earlier result as it was.

    Args:
        result: what to write.
        folder: where to; files of an earlier result are replaced or removed.
        extras: measurements for the report.

    Returns:
        The files a person will look for.

    Raises:
        OutputError: the folder cannot be written.
        LoweringError: an op has no ONNX form.
        MissingDependencyError: a package for the outputs is missing.
    """
    measured = dict(extras or {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; choose a writable folder") from error
    try:
        result.save(staging)
        if result.program[Settings].target == "onnxruntime":
            measured |= export(result, staging / "model.onnx")
        write_reports(result, staging, measured)
        _move_in(staging, folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; choose a writable folder") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shown = [folder / name for name in ("plan.json", "model.onnx", "report.html", "report.json")]
    return [path for path in shown if path.exists()]


def _move_in(staging: Path, folder: Path) -> None:
    stale = [*(folder / name for name in OWN_FILES), *folder.glob("sensitivity_*.npz")]
    for path in stale:
        path.unlink(missing_ok=True)
    # result.json comes last: a folder with it is whole.
    for path in sorted(staging.iterdir(), key=lambda made: made.name == "result.json"):
        path.replace(folder / path.name)


def export(result: Result, path: Path, options: OnnxOptions | None = None) -> dict[str, Any]:
    """Write the ONNX model and return what it measures: its bytes, and the kernel ONNX Runtime runs for each layer.

    Raises:
        OptionError: an option that does not fit the network.
        OutputError: the path cannot be written.
        LoweringError: an op has no ONNX form.
        MissingDependencyError: the onnx extra is not installed.
    """
    session = onnx_module("onnx_session")
    written = result.to_onnx(path, options)
    return {"bytes_on_disk": written.bytes, "kernels": dict(session.kernel_report(path).kernels)}


def write_reports(result: Result, folder: Path, extras: Mapping[str, Any] | None = None) -> None:
    """Write `report.html` and `report.json`.

    Raises:
        OutputError: the folder cannot be written.
        OptionError: an extra of unknown name.
        MissingDependencyError: jinja2 is not installed.
    """
    data = content(result, extras)
    page = render(data)
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_json(folder / "report.json", "report", FORMAT_VERSION, data)


def told_in_report(result: Result, folder: Path, found: Mapping[str, Any]) -> bool:
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
        told = {row["name"]: row["choice"] for row in document["layers"]}
        measured = document["measured"]
    except (FileFormatError, KeyError, TypeError):
        # The report is made anew from the result; an old one only helps.
        return {}
    plan = {name: choice.label for name, choice in result.allocation.choices.items()}
    return dict(measured) if told == plan and isinstance(measured, dict) else {}
