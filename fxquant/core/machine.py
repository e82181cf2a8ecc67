"""The machine and the packages that a measured time belongs to."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from fxquant.core.store import text_digest

LISTING = Path("/proc/cpuinfo")


def machine(packages: Iterable[str] = ("torch",)) -> dict[str, str]:
    """Return what times depend on besides the network: CPU model, its flags, usable cores, versions of packages.

    Args:
        packages: distributions whose versions count; those that are not installed are left out.
    """
    lines = dict(_fields(LISTING.read_text(encoding="utf-8"))) if LISTING.is_file() else {}
    # A container may be lent fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    model = lines.get("model name") or platform.processor() or platform.machine()
    found = {"cpu": model, "flags": text_digest(" ".join(sorted(lines.get("flags", "").split())))[:12]}
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
