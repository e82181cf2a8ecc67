"""Solve the integer programs of the data folder: objective, proven bound, gap and seconds of each.

python benchmarks/iqp_solver.py [--seconds 60] [--only resnet56] [--data ../shared/data]

One thread. The reference columns are the data folder's (a commercial solver, 60 s, one core; local search where it
has no figure). Writes benchmarks/results/iqp_solver.json beside the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

# The figures are for one thread; the linear algebra library reads this when numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from fxquant.core.errors import FileFormatError
from fxquant.passes.allocation import Solution, solve_iqp

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "iqp_solver.json"
HEADER = ("instance @ average bits", "known", "objective", "bound", "gap", "status", "seconds", "ref. gap", "ref. s")


def instances(folder: Path, only: str) -> dict[str, dict[str, Any]]:
    """The reference table, one entry per "name@average bits".

    Raises:
        FileFormatError: the folder holds no reference table.
    """
    path = folder / "reference.json"
    if not path.exists():
        raise FileFormatError(f"{path} is absent; pass the data folder with --data or FXQUANT_DATA")
    table: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return {key: figures for key, figures in table.items() if only in key}


def solve(folder: Path, key: str, seconds: float, seed: int) -> Solution:
    """Solve one instance under its limit on average bits per weight."""
    name, average_bits = key.split("@")
    with np.load(folder / f"{name}.npz") as data:
        values, weights, bits = data["H"], data["weight_count"].astype(float), data["bits"].astype(float)
    groups = [np.arange(start, start + len(bits)) for start in range(0, len(values), len(bits))]
    costs = np.outer(weights, bits).reshape(1, -1)
    limits = [float(average_bits) * weights.sum()]
    return solve_iqp(values, groups, costs, limits, time_limit=seconds, seed=seed)


def row(key: str, reference: dict[str, Any], found: Solution) -> dict[str, Any]:
    """One line of the table, as plain figures."""
    known = [reference.get("reference_objective"), reference.get("local_search_objective")]
    best_known = min(value for value in known if value is not None)
    entry = {
        "instance": key,
        "best_known": best_known,
        "objective": found.objective,
        "bound": found.bound,
        "gap": found.gap,
        "status": found.status,
        "seconds": round(found.seconds, 2),
        "reference_seconds": reference.get("reference_seconds"),
        "reference_gap": None,
    }
    if reference.get("reference_objective") is not None:
        distance = reference["reference_objective"] - reference["reference_bound"]
        entry["reference_gap"] = distance / abs(reference["reference_objective"])
    return entry


def line(entry: dict[str, Any]) -> str:
    """One line of the table, as text."""
    reference_gap = "-" if entry["reference_gap"] is None else f"{entry['reference_gap']:.1%}"
    reference_seconds = "-" if entry["reference_seconds"] is None else f"{entry['reference_seconds']:.2f}"
    cells = (
        entry["instance"],
        f"{entry['best_known']:.6g}",
        f"{entry['objective']:.6g}",
        f"{entry['bound']:.6g}",
        f"{entry['gap']:.2%}",
        entry["status"],
        f"{entry['seconds']:.2f}",
        reference_gap,
        reference_seconds,
    )
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit per instance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the instance's name")
    data = os.environ.get("FXQUANT_DATA", str(HERE.parent.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(data))
    arguments = parser.parse_args()
    folder = arguments.data / "iqp"
    entries = []
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|", flush=True)
    for key, reference in instances(folder, arguments.only).items():
        entries.append(row(key, reference, solve(folder, key, arguments.seconds, arguments.seed)))
        print(line(entries[-1]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    setting = {
        "time_limit_seconds": arguments.seconds,
        "seed": arguments.seed,
        "threads": os.environ["OPENBLAS_NUM_THREADS"],
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.write_text(json.dumps({"setting": setting, "rows": entries}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
