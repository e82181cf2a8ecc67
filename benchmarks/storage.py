"""What do weights of each format take: bytes of the file, time and memory to load it, and does it run as int8 does?

`python -m benchmarks.storage [network ...]`: one file for each format in all layers, and one that mixes them, against
the same integers in a byte each. A file is loaded in a process of its own, files in turn; time is that of the processor
(the session alone, one thread), memory what the process holds at most above what it held before (Linux only).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from fxquant.api import calibrate, capture, prepare
from fxquant.backends.onnx import ExportReport, OnnxOptions, executable, export_onnx, kernel_report
from fxquant.core.facts import BitAllocation, Settings
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import CalibrationSet
from fxquant.passes import simulate

DEFAULT = ("resnet20", "mobilenet_v2", "resnet18")
PLANS = {
    **{f"{bits} bits": (f"W{bits}A8",) for bits in (8, 7, 6, 5, 4, 3, 2)},
    **{f"codebook {bits} bits": (f"W{bits}cA8",) for bits in (1, 2, 3, 4)},
    "powers of two, 3 bits": ("W3pA8",),
    "rows of several widths": ("W2.5rA8",),
    "2, 3, 4, 8 bits in turn": ("W2A8", "W3A8", "W4A8", "W8A8"),
}
CALIBRATION_IMAGES = 8
ROUNDS = 9

LOAD = """
import json, sys, time, onnxruntime
def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 4, 1
before, began = kilobytes("VmRSS"), time.process_time()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
seconds = time.process_time() - began
print(json.dumps([1000 * seconds, (kilobytes("VmHWM") - before) * 1024 / 1e6]))
"""

Row = dict[str, str | float | int]


@dataclass(frozen=True)
class File:
    """One file: how it was written, processor milliseconds and megabytes to load it."""

    report: ExportReport
    milliseconds: float
    megabytes: float


def planned(program: Program, labels: tuple[str, ...]) -> GraphModule:
    """Return the simulated graph whose layers take these precisions in turn."""
    sites = program[Sites].sites
    choices = {site.name: Choice.parse(labels[index % len(labels)]) for index, site in enumerate(sites)}
    return simulate(program, BitAllocation(choices)).module


def loaded(paths: list[Path]) -> list[tuple[float, float]]:
    """Return milliseconds and megabytes to load each file: the medians over rounds in which they take turns."""
    found: dict[Path, list[list[float]]] = {path: [] for path in paths}
    for turn in range(ROUNDS):
        shift = turn % len(paths)
        for path in paths[shift:] + paths[:shift]:
            done = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, check=True)
            found[path].append(json.loads(done.stdout))
    return [(statistics.median(ms), statistics.median(mb)) for ms, mb in (zip(*found[p], strict=True) for p in paths)]


def same_kernels_and_answers(path: Path, plain: Path, image: Tensor) -> bool:
    """Whether ONNX Runtime optimizes both files to the same operators, which answer alike to the last bit."""
    one, other = (kernel_report(each) for each in (path, plain))
    same = one.operators == other.operators and one.kernels == other.kernels
    return same and torch.equal(executable(path, threads=1)((image,)), executable(plain, threads=1)((image,)))


def measure(name: str) -> list[Row]:
    """Return the rows of one network."""
    network, labels = NETWORKS[name], sorted({label for plan in PLANS.values() for label in plan})
    images = CalibrationSet((network.calibration(CALIBRATION_IMAGES),))
    bits = tuple(Choice.parse(label).weight.label for label in labels)
    program = calibrate(
        prepare(capture(network.factory(), images), Settings(bits=bits, scoring_rounding="nearest")), [images.inputs]
    )
    weights = sum(site.weight_count for site in program[Sites].sites)
    with tempfile.TemporaryDirectory() as folder:
        reports, same = [], []
        for index, plan in enumerate(PLANS.values()):
            module, path, plain = planned(program, plan), Path(folder) / f"{index}.onnx", Path(folder) / "plain.onnx"
            reports.append(export_onnx(module, path))
            _ = export_onnx(module, plain, options=OnnxOptions(packed=False))
            same.append(same_kernels_and_answers(path, plain, images.slice(0, 1).inputs[0]))
        files = [File(r, *took) for r, took in zip(reports, loaded([r.path for r in reports]), strict=True)]
    first = files[0]
    return [
        {
            "network": name,
            "weights": plan,
            "file bytes": file.report.bytes,
            "x float weights": round(file.report.bytes / 4 / weights, 4),
            "opset": file.report.opset,
            "load ms": round(file.milliseconds, 1),
            "x load of int8": round(file.milliseconds / first.milliseconds, 2),
            "peak MB": round(file.megabytes, 1),
            "x peak of int8": round(file.megabytes / first.megabytes, 2),
            "same kernels and bits": "yes" if alike else "no",
        }
        for plan, file, alike in zip(PLANS, files, same, strict=True)
    ]


def main() -> None:
    """Measure, print the table, write the JSON."""
    torch.set_num_threads(1)
    rows = [row for name in asked(__doc__, "network", DEFAULT) for row in measure(name)]
    write("storage", rows, {"calibration_images": CALIBRATION_IMAGES, "rounds": ROUNDS, "threads": 1})


if __name__ == "__main__":
    main()
