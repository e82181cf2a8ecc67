"""`fxquant inspect`: what an ONNX file holds, as text for the terminal or as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxquant.core.errors import FileFormatError
from fxquant.core.facts import BitAllocation
from fxquant.core.host import printable
from fxquant.core.storage import parse_json
from fxquant.report import bytes_text, count_text, percent_text, table_text

if TYPE_CHECKING:
    from fxquant.backends.onnx import Inspection

FORMAT_VERSION = 1
PLAN = "fxquant_plan"
"""Key under which an exported file carries its plan."""
SHOWN = 40
"""Layers, notes and texts that the terminal shows at most."""
TEXT = 100
"""Letters of a text that the terminal shows at most."""


def inspect(path: Path, runtime: bool = True) -> dict[str, Any]:
    """Return what a file holds as plain JSON values.

    Args:
        path: an ONNX file of any origin.
        runtime: ask ONNX Runtime which kernels it takes; False only reads.

    Raises:
        FileFormatError: missing, damaged, too large, or no ONNX model.
        MissingDependencyError: the onnx extra is not installed.
    """
    from fxquant.backends.onnx import inspect_onnx

    found = inspect_onnx(path, runtime)
    document = {"kind": "inspection", "version": FORMAT_VERSION, "path": str(path), **asdict(found)}
    document["plan"] = _plan(found, document)
    return document


def _plan(found: Inspection, document: dict[str, Any]) -> dict[str, str] | None:
    """Return site -> precision of the plan in the file, None where there is none that can be read."""
    if PLAN not in found.metadata:
        return None
    try:
        plan = BitAllocation.from_json({"choices": parse_json(found.metadata[PLAN])})
    except (ValueError, FileFormatError) as error:
        document["notes"] = (*found.notes, f"the plan in the file cannot be read ({error})")
        return None
    return {site: choice.label for site, choice in plan.choices.items()}


def as_json(document: dict[str, Any]) -> str:
    """Return the document as JSON of ASCII letters, so that no name can rewrite a terminal."""
    return json.dumps(document, indent=2, ensure_ascii=True)


def as_text(document: dict[str, Any]) -> str:
    """Return the document as a few lines and tables of at most 100 columns, without control characters."""
    parts = [_head(document), _stored(document), _operators(document), _layers(document)]
    return "\n\n".join(part for part in [*parts, _texts(document), _notes(document)] if part)


def _head(document: dict[str, Any]) -> str:
    opsets = ", ".join(f"{domain} {version}" for domain, version in document["opsets"].items())
    lines = [
        f"{document['path']}: {bytes_text(document['bytes'])}, opset {opsets or 'unknown'}, "
        f"IR {document['ir_version']}, producer: {document['producer'] or 'unknown'}"
    ]
    for word, values in (("input", document["inputs"]), ("output", document["outputs"])):
        for value in values[:SHOWN]:
            lines.append(f"{word} {value['name']}: {value['type']} {' x '.join(value['shape']) or 'scalar'}")
    return "\n".join(_cut(line, 4 * TEXT) for line in lines)


def _stored(document: dict[str, Any]) -> str:
    total = sum(row["bytes"] for row in document["stored"].values())
    rows = [
        (
            kind,
            str(row["tensors"]),
            count_text(row["elements"]),
            bytes_text(row["bytes"]),
            percent_text(row["bytes"] / total),
        )
        for kind, row in document["stored"].items()
        if total
    ]
    return table_text(("stored as", "tensors", "elements", "bytes", "share"), rows) if rows else ""


def _operators(document: dict[str, Any]) -> str:
    rows = [
        (
            operator,
            _cut(", ".join(f"{precision} {count}" for precision, count in sorted(counts.items())), 60),
            str(sum(counts.values())),
        )
        for operator, counts in document["operators"].items()
    ]
    return table_text(("operator", "by precision", "nodes"), rows, left=2) if rows else ""


def _layers(document: dict[str, Any]) -> str:
    layers = document["layers"]
    if not layers:
        return "no operator with a weight"
    float_layers = [layer for layer in layers if layer["reason"] is not None]
    kernels = Counter(layer["kernel"] for layer in layers if layer["reason"] is None)
    unknown = kernels.pop(None, 0)
    counts = ", ".join(f"{count} by {kernel}" for kernel, count in sorted(kernels.items()))
    lines = [f"{kernels.total()} of {len(layers)} layers with weights in integers" + (f": {counts}" if counts else "")]
    if unknown:
        lines.append(f"{unknown} quantized in the file; ONNX Runtime was not asked for their kernels")
    if float_layers:
        lines.append(f"in float ({len(float_layers)}):")
        lines += [f"  {_cut(row['name'], 40)} ({row['operator']}): {row['reason']}" for row in float_layers[:SHOWN]]
        lines += _more(len(float_layers))
    return "\n".join(map(printable, lines))


def _texts(document: dict[str, Any]) -> str:
    lines = []
    plan = document["plan"]
    if plan is not None:
        counts = Counter(plan.values())
        lines.append(
            f"plan of {len(plan)} layers: " + ", ".join(f"{count} x {label}" for label, count in sorted(counts.items()))
        )
    others = {key: text for key, text in document["metadata"].items() if key != PLAN or plan is None}
    lines += [_cut(f"metadata {key}: {text}") for key, text in list(others.items())[:SHOWN]]
    return "\n".join([*map(printable, lines), *_more(len(others))])


def _notes(document: dict[str, Any]) -> str:
    notes = document["notes"]
    return "\n".join([*(_cut(f"note: {note}", 4 * TEXT) for note in notes[:SHOWN]), *_more(len(notes))])


def _more(count: int) -> list[str]:
    return [f"  ... and {count - SHOWN} more; --json has all"] if count > SHOWN else []


def _cut(text: str, letters: int = TEXT) -> str:
    """Return the text without control characters, its end left out where it is long."""
    return printable(text if len(text) <= letters else f"{text[: letters - 1]}…")
