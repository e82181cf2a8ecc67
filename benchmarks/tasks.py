"""What do quantized files keep on every task: detection, segmentation, super-resolution, classification and others?

`python -m benchmarks.tasks [task ...] [--samples N]`: the float network in PyTorch and as a file, all layers at W8A8,
mixed plans of default effort and uniform plans of the same average bits. Every quantized figure is that of the written
ONNX file in ONNX Runtime, on one thread. What is finished is kept in `build/tasks`, so that a killed run goes on;
remove the folder of a task after a change that matters to it. Of tasks with several seeds the rows are means. Rows of
other tasks stay in the JSON. `--samples` evaluates on fewer samples, for a quick look that writes no JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import fxquant
from benchmarks.report_table import RESULTS, table, write
from benchmarks.task import Answers, Task, file_answers, torch_answers
from benchmarks.task_table import TASKS
from fxquant import Budget, Result
from fxquant.api import capture
from fxquant.backends.onnx import export_onnx, kernel_report
from fxquant.core.errors import FileFormatError
from fxquant.core.storage import read_json, write_json

FOLDER = Path("build/tasks")

Row = dict[str, Any]


def kept(path: Path, make: Callable[[], Row]) -> Row:
    """Return what an earlier run wrote to a JSON file, or make and write it."""
    with suppress(FileFormatError):
        found: Row = read_json(path, "task", 1)["row"]
        return found
    row = make()
    write_json(path, "task", 1, {"row": row})
    return row


def quantized(task: Task, contestant: str, folder: Path, seed: int = 0) -> Result:
    """Return a task's result for a contestant; `folder` keeps scores, which all mixed plans of a seed share."""
    kind, _, bits = contestant.rpartition(" ")
    options: dict[str, Any] = {**task.options, "seed": seed}
    budget = Budget(average_bits=float(bits) if kind else 8)
    if kind == "mixed":
        return fxquant.quantize(
            task.model(), task.calibration(), budget, workdir=folder, progress=False, options=options
        )
    only = (bits if kind else "8",)
    return fxquant.quantize(task.model(), task.calibration(), budget, bits=only, progress=False, options=options)


def wrote(task: Task, contestant: str, path: Path, seed: int) -> Row:
    """Write a contestant's file; return what it weighs, what runs on integers, and why the rest does not."""
    started = time.perf_counter()
    result = quantized(task, contestant, path.parent / f"work {seed}", seed)
    seconds = time.perf_counter() - started
    size = result.to_onnx(path).bytes
    kernels, covered = kernel_report(path), result.report_data()["coverage"]
    why = "; ".join(f"{each['reason']}: {', '.join(each['layers'])}" for each in covered["reasons"])
    return {
        "bytes": size,
        "integer layers": len(kernels.kernels) - len(kernels.float_layers),
        "layers": len(kernels.kernels),
        "float kernels": ", ".join(kernels.float_layers),
        "float because": why,
        "seconds": round(seconds, 1),
    }


def wrote_float(task: Task, path: Path) -> Row:
    """Write the float file; return what it weighs."""
    free = bool(task.options.get("dynamic_image", False))
    program = capture(task.model(), task.calibration(), dynamic_image=free)
    return {"bytes": export_onnx(program.module, path).bytes}


def measure(task: Task, samples: int | None) -> list[Row]:
    """Return the rows of a task, the float network first."""
    folder = FOLDER / task.name
    folder.mkdir(parents=True, exist_ok=True)

    def figures(name: str, answers: Callable[[], Answers]) -> Row:
        place = folder / f"{name}, {'all' if samples is None else samples}.json"
        return kept(place, lambda: dict(task.evaluate(answers(), samples)))

    network: Row = {"task": task.name, "metric": task.metric}
    rows = [network | {"contestant": "float, PyTorch"} | figures("torch", lambda: torch_answers(task.model()))]
    path = folder / "float.onnx"
    floating = kept(path.with_suffix(".json"), lambda: wrote_float(task, path))
    reference = figures("float", lambda: file_answers(path))
    rows.append(network | {"contestant": "float"} | reference | floating)
    for contestant in task.contestants:
        names = [f"{contestant}, seed {seed}" for seed in range(task.seeds)]
        files = [folder / f"{name}.onnx" for name in names]
        made, *_ = [
            kept(file.with_suffix(".json"), partial(wrote, task, contestant, file, seed))
            for seed, file in enumerate(files)
        ]
        found = means([figures(name, partial(file_answers, file)) for name, file in zip(names, files, strict=True)])
        lost = task.lost(found[task.metric], reference[task.metric])
        row = network | {"contestant": contestant} | found | {"lost": lost}
        if contestant in task.limits:
            row |= {"limit": task.limits[contestant], "kept": "yes" if lost <= task.limits[contestant] else "NO"}
        rows.append(row | made | {"file ratio": made["bytes"] / floating["bytes"]})
        print(table([brief(row) for row in rows]), flush=True)
    return rows


def means(found: Sequence[Row]) -> Row:
    """Return the mean of each figure, and of several its standard error."""
    if len(found) == 1:
        return found[0]
    values = {name: [row[name] for row in found] for name in found[0]}
    errors = {f"{name}, s.e.": stdev(each) / len(each) ** 0.5 for name, each in values.items()}
    return {name: fmean(each) for name, each in values.items()} | errors | {"seeds": len(found)}


def brief(row: Mapping[str, object]) -> Row:
    """Return a row without the columns that are texts about layers."""
    return {key: value for key, value in row.items() if key not in ("float because", "float kernels")}


def others(measured: Sequence[str]) -> list[Row]:
    """Return the rows in the JSON of tasks that were not measured now."""
    with suppress(FileFormatError):
        rows: list[Row] = read_json(RESULTS / "tasks.json", "benchmark", 1)["rows"]
        return [row for row in rows if row["task"] not in measured]
    return []


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure tasks, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="task", help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--samples", type=int, help="evaluate on so many samples, and write no JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in given.names or TASKS:
        rows = measure(TASKS[name], given.samples)
        if given.samples is None:
            # After each task, so that a killed run has written what it measured.
            write("tasks", [*others([name]), *rows], {"threads": 1, "effort": "default"})


if __name__ == "__main__":
    main()
