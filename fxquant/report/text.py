"""How numbers are written for people: one place, so that the page and the terminal agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

UNITS = {"size_mb": "MB", "size_ratio": "x float", "file_mb": "MB", "file_ratio": "x float", "average_bits": "bits"}
UNITS |= {"bops": "bit operations", "bops_ratio": "x float", "activation_mb": "MB"}
UNITS |= {"latency_ms": "ms", "latency_ratio": "x float", "loss": "on held-out images"}
UNITS |= dict.fromkeys(("disagreement", "accuracy_drop"), "of held-out images")
"""Limit of a budget -> its unit."""


def bytes_text(count: float) -> str:
    """Return `57.7 kB` for 57686; decimal units, as budgets use."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} B"


def count_text(count: float) -> str:
    """Return `9.44 M` for 9437184."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def loss_text(value: float | None) -> str:
    """Return a loss with three digits that matter, `–` where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0.0 and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def percent_text(share: float | None) -> str:
    """Return `12.5 %`, `–` where there is no share."""
    if share is None:
        return "–"
    if share == 0.0:
        return "0 %"
    return f"{100 * share:.1f} %" if abs(share) < 1 and round(1000 * abs(share)) < 1000 else f"{100 * share:.0f} %"


def decibels_text(value: float | None) -> str:
    """Return `42.1 dB`, `exact` where nothing is lost."""
    return "exact" if value is None else f"{value:.1f} dB"


def limit_text(name: str, value: float | None) -> str:
    """Return a limit with its unit, `–` where there is no value."""
    return "–" if value is None else f"{value:.4g} {UNITS.get(name, '')}".strip()


def bound_text(limit: Mapping[str, Any], confidence: float) -> str:
    """Return what the measured answers say of all images: their upper bound, and on how many images it rests."""
    most = limit_text(limit["name"], limit["bound"]).removesuffix(UNITS[limit["name"]]).strip()
    return f"at most {most} at {100 * confidence:g} % confidence from {limit['images']} images"


def latency_text(latency: Mapping[str, Any]) -> str:
    """Return what a plan is predicted to take, and how noisy the measurements were that say so."""
    text = f"Latency {latency['predicted_ms']:.4g} ms predicted, float {latency['float_ms']:.4g} ms"
    noise = latency["noise"]
    if noise is None:
        return text
    shares = {"outliers": "outliers", "waiting": "of the time waiting for others"}
    more = ", ".join(f"{percent_text(noise[name])} {words}" for name, words in shares.items())
    return f"{text}; rounds spread by {percent_text(noise['spread'])}, {more}"
