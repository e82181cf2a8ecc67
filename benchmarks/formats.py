"""What is each weight format worth, layer by layer and for whole networks, and what does it weigh and cost?

`python -m benchmarks.formats [network ...]`: every weight in one format, GPTQ on float inputs, activations at 8 bits.
Two plans for each format: all layers in it ("all"), and first, last and depthwise layers at 8 bits ("inner"). Columns:
the output error of all layers of a kind against uniform levels of as many whole bits, accuracy and KL of the ONNX file
on images that nothing was tuned on, its bytes, its load time and the time of one image against plain int8.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.arguments import asked
from benchmarks.report_table import interleaved, write
from benchmarks.zoo import NETWORKS
from fxquant.api import calibrate, capture, prepare
from fxquant.backends.onnx import executable, export_onnx
from fxquant.core.facts import BitAllocation, Settings, WeightGrids
from fxquant.core.ir import Choice, Program, RowGrid, Site, Sites, WeightFormat, tensor_at
from fxquant.core.run import LOSSES, CalibrationSet, model_outputs
from fxquant.passes import simulate
from fxquant.passes.formats import RowProblem, find, rows_of
from fxquant.passes.rounding.closed_form import Prefix, go_to, gptq_rows, moments_of

FORMATS = ("1.6c", "2", "2p", "2c", "2.4c", "2.5r", "2.67c", "3", "3p", "3c", "3r", "4", "4p", "4c", "8")
CASES = {"resnet20": 256, "mobilenet_v1": 96, "mobilenet_v2": 96, "efficientnet_lite0": 96, "deit_tiny": 64}
"""Network -> calibration images."""
EVALUATION = {"resnet20": 1017}
"""Network -> evaluation images, where it is not 400."""
LOADS, ROUNDS = 5, 21

Row = dict[str, str | float | None]
Errors = dict[tuple[str, str], float]


def depthwise(site: Site, program: Program) -> bool:
    """Whether a layer has one input channel for each output channel."""
    weight = tensor_at(program.module, site.weight)
    return weight.dim() > 2 and weight.shape[1] == 1 and weight.shape[0] > 1


def kind_of(site: Site, program: Program) -> str:
    """Return what a layer counts as: depthwise, pointwise, conv or linear."""
    weight = tensor_at(program.module, site.weight)
    if weight.dim() == 2:
        return "linear"
    return "depthwise" if depthwise(site, program) else "pointwise" if weight[0, 0].numel() == 1 else "conv"


def banked(program: Program, images: CalibrationSet) -> tuple[Program, Errors, dict[str, float]]:
    """Return the program with every weight rounded in every format, output errors by (kind, format), and seconds."""
    grids = {site: dict(known) for site, known in program[WeightGrids].grids.items()}
    rounded: dict[tuple[str, WeightFormat], Tensor] = {}
    errors: Errors = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    walk = Prefix(program.module, images)
    for site in program[Sites].sites:
        _ = go_to(site.nodes[0], walk)
        moments = moments_of(site, program.module, walk)
        weight = tensor_at(program.module, site.weight)
        rows = rows_of(weight, groups=len(moments.gram))
        problem = RowProblem(rows, moments.gram, gptq_rows(moments))
        outputs = float(((rows @ moments.gram) * rows).sum())
        for chosen in grids[site.name]:
            started = time.process_time()
            found: RowGrid = find(problem, chosen)
            grids[site.name][chosen] = grid = found.grid()
            rounded[site.name, chosen] = grid.dequantize(problem.rounder(rows, found).reshape(weight.shape))
            seconds[chosen.label] += time.process_time() - started
            # Relative to the layer's output, so that no layer counts more for having larger values.
            errors[kind_of(site, program), chosen.label] += float(problem.error(found).sum()) / max(outputs, 1e-30)
    return program.with_facts(WeightGrids(grids, rounded)), errors, seconds


def plan(program: Program, chosen: WeightFormat, inner: bool) -> BitAllocation:
    """Return all layers in one format, or all but the first, the last and depthwise ones."""
    sites = program[Sites].sites
    ends = {sites[0].name, sites[-1].name} if inner else set[str]()
    kept = {site.name for site in sites if site.name in ends or (inner and depthwise(site, program))}
    return BitAllocation({s.name: Choice(8, 8) if s.name in kept else Choice.of(chosen, 8) for s in sites})


def loading(path: Path) -> float:
    """Return the seconds in which ONNX Runtime loads a file, the least of several."""
    taken = []
    for _ in range(LOADS):
        started = time.perf_counter()
        executable(path.read_bytes())
        taken.append(time.perf_counter() - started)
    return min(taken)


def measure(name: str) -> list[Row]:
    """Return the rows of one network."""
    network = NETWORKS[name]
    images, labels = network.evaluation(EVALUATION.get(name, 400))
    calibration = CalibrationSet((network.calibration(CASES[name]),))
    program = calibrate(
        prepare(capture(network.factory(), calibration), Settings(bits=FORMATS)), calibration, progress=False
    )
    float_answer = model_outputs(program.module, (images,), 16)
    right = 100 * float((float_answer.argmax(dim=1) == labels).double().mean())
    rows: list[Row] = [{"network": name, "format": "float", "plan": "", "accuracy %": right, "KL": 0.0}]
    banked_program, errors, seconds = banked(program, calibration)
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for label in reversed(FORMATS):
            chosen = WeightFormat.parse(label)
            for which in ("inner", "all"):
                simulated = simulate(banked_program, plan(program, chosen, which == "inner"))
                path = Path(folder) / f"{label}-{which}.onnx"
                size = export_onnx(simulated.module, path).bytes
                run = executable(path.read_bytes())
                answer = torch.cat([run((images[k : k + 8],)) for k in range(0, len(images), 8)])
                kl = float(LOSSES["kl"](float_answer, answer, None).mean())
                correct = 100 * float((answer.argmax(dim=1) == labels).double().mean())
                row: Row = {"network": name, "format": label, "plan": which, "accuracy %": correct, "KL": kl}
                rows.append(row | {"bytes": size, "seconds to find": round(seconds[label], 2)})
                if which == "all":
                    runs[label] = run
                    rows[-1] |= {"load s": round(loading(path), 3)}
                    even = str(max(2, int(chosen.bits)))
                    kinds = sorted({kind for kind, _ in errors})
                    rows[-1] |= {f"error {k}": errors[k, label] / max(errors[k, even], 1e-30) for k in kinds}
        timings = interleaved({label: partial(run, (images[:1],)) for label, run in runs.items()}, ROUNDS)
    for row in rows:
        if row["plan"] == "all":
            row["time / int8"] = round(timings[str(row["format"])].median / timings["8"].median, 3)
    return rows


def main() -> None:
    """Measure, print the table, write the JSON of each network."""
    for name in asked(__doc__, "network", CASES):
        rows = measure(name)
        meta = {"calibration images": CASES[name], "evaluation images": EVALUATION.get(name, 400)}
        write(f"formats_{name}", rows, meta | {"threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
