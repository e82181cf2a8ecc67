"""`python -m tests`: lint, types, then the tests; stops at the first that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STEPS = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("pytest", "-q"))


def main() -> int:
    """Run every step from the repository root and return the first exit status that is not 0."""
    root = Path(__file__).resolve().parents[1]
    for step in STEPS:
        print("$", " ".join(step), flush=True)
        status = subprocess.run([sys.executable, "-m", *step], cwd=root, check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
