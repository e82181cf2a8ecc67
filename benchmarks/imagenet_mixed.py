"""What do mixed plans keep on ImageNet networks, and what do they weigh and cost once deployed in ONNX Runtime?

`python -m benchmarks.imagenet_mixed [network ...]`: DeiT-tiny and MobileNetV2, W8A8, W4A8, and W{4,8} A8 at average 6
and 5 bits. Top-1 is of the written ONNX file on 1300 labelled validation images (calibration uses train images);
milliseconds are of one image, float and quantized interleaved in one run.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from benchmarks.arguments import asked
from benchmarks.report_table import interleaved, write
from benchmarks.zoo import NETWORKS
from fxquant.api import calibrate, capture, measure_sensitivity, prepare
from fxquant.backends.onnx import KernelReport, executable, export_onnx, kernel_report
from fxquant.core.facts import BitAllocation, Budget, Settings
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import CalibrationSet, model_outputs
from fxquant.flow import allocate as search
from fxquant.passes import simulate

SEED = 0
CALIBRATION_IMAGES = 128
SCORING_IMAGES = 48
ROUNDS = 31

Row = dict[str, str | float | None]


def deployed(module: GraphModule, images: Tensor, labels: Tensor) -> tuple[Row, bytes, Tensor]:
    """Export a graph, and return accuracy (%) and bytes of the file, the file, and its answers."""
    with tempfile.TemporaryDirectory() as folder:
        report = export_onnx(module, Path(folder) / "model.onnx")
        model = report.path.read_bytes()
    run = executable(model)
    answer = torch.cat([run((images[k : k + 8],)) for k in range(0, len(images), 8)])
    accuracy = 100 * float((answer.argmax(dim=1) == labels).double().mean())
    return {"accuracy %": round(accuracy, 2), "bytes": report.bytes}, model, answer


def share(report: KernelReport) -> float:
    """Return the percentage of layers with constant weights that run on an integer kernel."""
    integer = sum(kernel != "float" for kernel in report.kernels.values())
    return 100 * integer / max(1, len(report.kernels))


def uniform(program: Program, bits: int) -> BitAllocation:
    """Return the plan with every weight at `bits` and every activation at 8."""
    return BitAllocation({site.name: Choice(bits, 8) for site in program[Sites].sites})


def measure(name: str) -> list[Row]:
    """Return the rows of one network."""
    network = NETWORKS[name]
    images, labels = network.evaluation()
    calibration = CalibrationSet((network.calibration(CALIBRATION_IMAGES),))
    scoring, held_out = calibration.split(0.25, SEED)
    settings = Settings(bits=(4, 8), seed=SEED)
    started = time.perf_counter()
    program = calibrate(prepare(capture(network.factory(), calibration), settings), scoring)
    program = measure_sensitivity(program, scoring.slice(0, SCORING_IMAGES))
    seconds = time.perf_counter() - started
    plans: dict[str, BitAllocation] = {"W8A8": uniform(program, 8), "W4A8": uniform(program, 4)}
    for bits in (6.0, 5.0):
        solved = search.allocate(program, Budget(average_bits=bits), held_out)
        plans[f"mixed, {bits:g} bits ({solved[BitAllocation].estimator})"] = solved[BitAllocation]
    graphs = {"float": program.module} | {key: simulate(program, plan).module for key, plan in plans.items()}
    rows, models, one = [], {}, (images[:1],)
    for key, graph in graphs.items():
        row, model, answer = deployed(graph, images, labels)
        models[key] = executable(model)
        rows.append({"network": name, "plan": key, **row, "integer layers %": share(kernel_report(model))})
        if key != "float":
            part = images[:256]
            agreement = (model_outputs(graph, (part,), 16).argmax(dim=1) == answer[:256].argmax(dim=1)).double().mean()
            rows[-1] |= {"agrees with simulation %": round(100 * float(agreement), 2)}
            rows[-1] |= {
                "average bits": round(plans[key].used.get("average_bits", float(key[1]) if key[0] == "W" else 0), 3)
            }
    timings = interleaved({key: partial(run, one) for key, run in models.items()}, ROUNDS)
    for row in rows:
        timing = timings[str(row["plan"])]
        row |= {"ms": round(1e3 * timing.median, 3), "ms low": round(1e3 * timing.low, 3)}
        row |= {"ms high": round(1e3 * timing.high, 3)}
    rows[0]["seconds to score"] = round(seconds, 1)
    return rows


def main() -> None:
    """Measure, print the table, write the JSON."""
    names = asked(__doc__, "network", ("mobilenet_v2", "deit_tiny"))
    rows = [row for name in names for row in measure(name)]
    meta = {"seed": SEED, "calibration images": CALIBRATION_IMAGES, "scoring images": SCORING_IMAGES, "rounds": ROUNDS}
    write("imagenet_mixed", rows, meta | {"threads": torch.get_num_threads(), "batch": 1, "evaluation images": 1300})


if __name__ == "__main__":
    main()
