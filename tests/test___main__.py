from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_python_m_fxquant_gives_exit_codes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxquant", "report", "nowhere"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fxquant: error: nowhere is not a folder")
    assert done.stdout == ""
