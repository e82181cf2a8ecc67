"""The report as one HTML page that needs nothing else: no server, no network, no script."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from fxquant.core.errors import MissingDependencyError
from fxquant.core.host import printable
from fxquant.core.storage import atomic_path
from fxquant.report.curve_geometry import curve
from fxquant.report.pictures import bars, heat_map
from fxquant.report.text import (
    bound_text,
    bytes_text,
    count_text,
    decibels_text,
    latency_text,
    limit_text,
    loss_text,
    percent_text,
)

TEMPLATE = "report.html.j2"
NOISIEST = 6
"""Edges that are shown without asking, those with the most noise."""


def write_page(data: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a report's data and return its path.

    Args:
        data: as for `render`.
        path: the file to write.

    Raises:
        OutputError: the path cannot be written.
        MissingDependencyError: jinja2 is not installed.
    """
    page = render(data)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def render(data: Mapping[str, Any]) -> str:
    """Return the page of a report's data.

    Args:
        data: from `content`.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        # Imported by name here because only the page needs it.
        jinja2 = importlib.import_module("jinja2")
    except ImportError as error:
        raise MissingDependencyError(
            'the report page is made with jinja2, which is not installed; pip install "fxquant[report]"'
        ) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    filters: dict[str, Callable[..., str]] = {
        "bytes": bytes_text,
        "count": count_text,
        "loss": loss_text,
        "percent": percent_text,
        "times": lambda ratio: f"{1 / ratio:.2g}×",
        "decibels": decibels_text,
        "latency": latency_text,
    }
    environment.filters |= filters
    environment.globals |= {"limit": limit_text, "bound": bound_text}
    template = environment.from_string(files("fxquant.report").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    page: str = template.render(
        data=data,
        ranked=sorted(data["layers"], key=lambda row: -row["contribution"]),
        upgrades=_upgrades(data["layers"]),
        bars=bars(data["layers"]),
        curve=curve(data["frontier"]),
        plans=_plans(data["frontier"], data["layers"]),
        kernels=_kernels(data["layers"]),
        noisiest=sorted(data["edges"], key=_noise)[:NOISIEST],
        heat=heat_map(data["sensitivity"], data["layers"]),
        tiles=tiles(data),
        settings=json.dumps({"budget": data["asked"]["budget"], **data["asked"]["settings"]}, indent=2),
        largest_contribution=max((abs(row["contribution"]) for row in data["layers"]), default=0.0) or 1.0,
    )
    return page


def _shown(value: object) -> object:
    """Return a text without control characters, which turn letters round or end a page's text; markup as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(map(printable, value.split("\n")))


def _plans(frontier: Mapping[str, Any], layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the plans of the curve with their pictures and the layers in which they differ from the chosen one."""
    return [
        {
            **point,
            "bars": bars(layers, None if point["chosen"] else point["choices"]),
            "other": [
                (row["name"], row["choice"], label)
                for row, label in zip(layers, point["choices"], strict=True)
                if label != row["choice"]
            ],
        }
        for point in frontier["points"]
    ]


def _noise(edge: Mapping[str, Any]) -> float:
    return math.inf if edge["sqnr_db"] is None else float(edge["sqnr_db"])


def _kernels(layers: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return kernel -> layers that the runtime was seen to run on it, most layers first; empty where none is known."""
    found: dict[str, list[str]] = {}
    for row in layers:
        if row["kernel"] is not None:
            found.setdefault(row["kernel"], []).append(row["name"])
    return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))


def _upgrades(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the layers that gain from one step wider, most loss saved per byte first."""
    steps = [{"name": row["name"], "choice": row["choice"], "next": row["next_step"]} for row in layers]
    gains = [step for step in steps if step["next"] is not None and step["next"]["loss_saved"] > 0]
    return sorted(gains, key=lambda step: -step["next"]["loss_saved"] / max(1, step["next"]["extra_bytes"]))


NOISY = 0.5
"""Range of the quartiles against the median beyond which a time is no comparison."""


def tiles(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the headline numbers, each with what it is compared to."""
    outcome, covered, measured = data["outcome"], data["coverage"], data["measured"]
    shown: list[dict[str, str]] = []
    rows = {row["name"]: row for row in measured.get("comparison", ())}
    float_row, mixed = rows.get("float", {}), rows.get("mixed", {})
    if "accuracy" in mixed:
        against = f"float {percent_text(float_row['accuracy'])}" if "accuracy" in float_row else ""
        shown.append({"label": "Accuracy", "value": percent_text(mixed["accuracy"]), "note": against})
    elif outcome["measured_loss"] is not None:
        images = outcome["held_out_images"]
        note = f"on {images} calibration images; 0 is the float model" if images else "0 is the float model"
        value = f"{loss_text(outcome['measured_loss'])} {outcome['loss_unit'].split()[-1]}"
        shown.append({"label": f"Measured {outcome['loss_unit'].split()[0]} loss", "value": value, "note": note})
    ratio = outcome["size_ratio"]
    note = f"{1 / ratio:.3g}× smaller than float ({bytes_text(outcome['float_bytes'])})"
    shown.append({"label": "Parameters", "value": bytes_text(outcome["bytes"]), "note": note})
    if "milliseconds" in mixed:
        against = f"float {float_row['milliseconds']:.3g} ms" if "milliseconds" in float_row else ""
        if mixed["high"] - mixed["low"] > NOISY * mixed["milliseconds"]:
            # The median of such rounds is the time of no single one.
            against = f"too noisy to compare: {mixed['low']:.3g}–{mixed['high']:.3g} ms; run fxquant bench when idle"
        shown.append({"label": "Time for one image", "value": f"{mixed['milliseconds']:.3g} ms", "note": against})
    if outcome["average_bits"] is not None:
        counted = "over every quantized weight, scales not counted"
        shown.append({"label": "Stored bits per weight", "value": f"{outcome['average_bits']:.4g}", "note": counted})
    note = "none left in float" if not covered["in_float"] else f"{covered['in_float']} in float, reasons below"
    value = f"{covered['quantized']} of {covered['layers']}"
    shown.append({"label": "Layers quantized", "value": value, "note": note})
    gap = f"by {outcome['estimator']}" if outcome["gap"] is None else f"gap {percent_text(outcome['gap'])}"
    shown.append({"label": "Plan", "value": outcome["status"], "note": gap})
    return shown
