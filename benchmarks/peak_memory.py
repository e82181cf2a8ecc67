"""How much memory each stage of the pipeline takes on an ImageNet network, as the peak of the process.

`python -m benchmarks.peak_memory [network] [images]`: the stages of `fxquant.quantize` at its default effort, every
estimator on its own, then rounding, both lowerings and the report, in one process (Linux only: `/proc/self`).
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

import fxquant
from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.stage_clock import PEAK_RESET, memory_mb
from benchmarks.zoo import NETWORKS
from fxquant import flow
from fxquant.core.facts import EFFORTS, SensitivityMatrix, Settings, Surrogates
from fxquant.core.run import CalibrationSet
from fxquant.flow import allocate as search
from fxquant.flow import loss_in_use, round_plan
from fxquant.passes import Meter
from fxquant.result import Result

SEED = 0
LIMIT_GB = 3.0

Row = dict[str, str | float]
T = TypeVar("T")


class Stages:
    """Runs stages one after the other and notes what each of them took."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(self, name: str, stage: Callable[[], T]) -> T:
        """Run a stage; its peak counts everything the process holds meanwhile."""
        gc.collect()
        PEAK_RESET.write_text("5", encoding="utf-8")
        before, began = memory_mb("VmRSS"), time.monotonic()
        made = stage()
        seconds, peak = time.monotonic() - began, memory_mb("VmHWM")
        self.rows.append({"stage": name, "peak MB": peak, "before MB": before, "seconds": seconds})
        print(f"{name}: {peak:.0f} MB at most, {before:.0f} MB before, {seconds:.0f} s", flush=True)
        return made


def measure(name: str, count: int) -> list[Row]:
    """Return a row for each stage, and one for the whole."""
    network, stages, effort = NETWORKS[name], Stages(), EFFORTS["default"]
    images = stages("images", lambda: CalibrationSet((network.calibration(count),)))
    scoring, held_out = images.split(0.25, SEED)
    captured = stages("capture", lambda: fxquant.capture(network.factory(), images))
    settings = Settings(estimators=effort.estimators, refine_moves=effort.refine_moves, rounds=0, seed=SEED)
    prepared = stages("prepare", lambda: flow.prepare(captured, settings))
    program = stages("calibrate", lambda: flow.calibrate(prepared, scoring))
    matrices: dict[str, SensitivityMatrix] = {}
    for estimator in effort.estimators:
        one = program.with_facts(replace(settings, estimators=(estimator,)))
        scored = stages(f"score: {estimator}", partial(flow.measure_sensitivity, one, scoring))
        matrices[estimator] = scored[SensitivityMatrix]
    program = program.with_facts(matrices[effort.estimators[0]], Surrogates(matrices))
    budget = fxquant.Budget(average_bits=6)
    solved = stages("allocate, verify, refine", lambda: search.allocate(program, budget, held_out))
    meter = stages("measure the float answers", lambda: Meter(solved, held_out, loss_in_use(solved, held_out)))
    around = stages(
        "score around the plan",
        lambda: search.rescore_around(solved.with_facts(replace(settings, rounds=1)), budget, scoring, meter),
    )
    rounded = stages(f"round: {effort.rounding}", lambda: round_plan(around, effort.rounding, scoring, held_out))
    result = Result(rounded, held_out)
    with tempfile.TemporaryDirectory() as folder:
        stages("write ONNX", lambda: result.to_onnx(Path(folder) / "model.onnx"))
        stages("lower to PyTorch", lambda: fxquant.lower(result, "fx_int8")(images.inputs[0][:8]))
        stages("report", lambda: result.report(Path(folder) / "report.html"))
        stages("save", lambda: result.save(folder))
        stages("load", lambda: fxquant.load(folder))
    peak = max(float(row["peak MB"]) for row in stages.rows)
    return [*stages.rows, {"stage": "the whole", "peak MB": peak, "before MB": 0.0, "seconds": 0.0}]


def main() -> None:
    """Measure, print the table, write the JSON."""
    torch.set_num_threads(1)
    name, count = [*asked(__doc__, "network or images", ("mobilenet_v2",)), str(EFFORTS["default"].images)][:2]
    rows = measure(name, int(count))
    meta = {"network": name, "images": int(count), "seed": SEED, "limit GB": LIMIT_GB, "bits": "2, 4, 8"}
    write("peak_memory", rows, meta)
    if float(rows[-1]["peak MB"]) > 1000 * LIMIT_GB:
        sys.exit(f"the peak of {rows[-1]['peak MB']:.0f} MB is over {LIMIT_GB} GB")


if __name__ == "__main__":
    main()
