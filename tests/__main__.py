"""`python -m tests`: lint and types, then the tests on every core; stops at the first that fails.

Arguments go to pytest, for example `python -m tests -m "not slow"`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKS = (("ruff", "check", "."), ("ruff", "format", "--check", "."))
TYPES = ("mypy",)
# A file's tests share captured programs and trained results: they stay in one process.
TESTS = ("pytest", "-q", "-n", "auto", "--dist", "loadfile", "--durations", "10")


def started(step: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """Show a step and start it in the repository root."""
    print("$", " ".join(step), flush=True)
    return subprocess.Popen([sys.executable, "-m", *step], cwd=ROOT)


def main(arguments: list[str]) -> int:
    """Run every step and return the first exit status that is not 0."""
    for step in CHECKS:
        if status := started(step).wait():
            return status
    # mypy uses one core and a fresh clone has no cache of it: the tests run meanwhile.
    tests, types = started((*TESTS, *arguments)), started(TYPES)
    if status := types.wait():
        tests.terminate()
        _ = tests.wait()
        return status
    return tests.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
