"""The machine and the packages that a measured time belongs to."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from fxquant.core.storage import text_digest

LISTING = Path("/proc/cpuinfo")

INSTRUCTIONS: dict[str, str] = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX512 VNNI",
    "avx_vnni": "AVX VNNI",
    "i8mm": "ARM matrix products",
    "asimddp": "ARM dot products",
}
"""Flag of the processor -> its instructions that multiply and add int8, the fastest first."""


def cpu_model() -> str:
    """Return the processor's name."""
    return _listed().get("model name") or platform.processor() or platform.machine()


def int8_instructions() -> str | None:
    """Return the fastest instructions for products of int8, "" where the processor has none, None if unknown.

    Without such instructions a product takes several steps, and integers may be no faster than float.
    """
    listed = _listed()
    flags = set((listed.get("flags") or listed.get("Features") or "").split())
    return next((name for flag, name in INSTRUCTIONS.items() if flag in flags), "") if flags else None


def _listed() -> dict[str, str]:
    return dict(_fields(LISTING.read_text(encoding="utf-8"))) if LISTING.is_file() else {}


def machine(packages: Iterable[str] = ("torch",)) -> dict[str, str]:
    """Return what times depend on apart from the network: CPU model, its flags, usable cores, versions of packages.

    Args:
        packages: distributions whose versions count; those that are not installed are left out.
    """
    lines = _listed()
    # A container may be lent fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {"cpu": cpu_model(), "flags": text_digest(" ".join(sorted(lines.get("flags", "").split())))[:12]}
    found |= {"cores": str(cores), "system": f"{platform.system()} {platform.machine()}"}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _fields(text: str) -> Iterable[tuple[str, str]]:
    """Yield the fields of the first processor."""
    for line in text.split("\n\n")[0].splitlines():
        name, separator, value = line.partition(":")
        if separator:
            yield name.strip(), value.strip()
