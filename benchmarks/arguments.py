"""The command line of benchmarks that take names only, or nothing."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def asked(about: str | None, names: str = "", default: Iterable[str] = ()) -> list[str]:
    """Return the names given on the command line, the default ones where there are none.

    Args:
        about: what `--help` shows, the docstring of the benchmark.
        names: what the names are of; without it none may be given.
        default: names to take where none are given.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if names:
        parser.add_argument("names", nargs="*", metavar=names, help=f"default: {' '.join(default)}")
    given: list[str] = getattr(parser.parse_args(), "names", [])
    return given or list(default)
