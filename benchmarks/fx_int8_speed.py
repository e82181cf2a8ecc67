"""What do the integer FX graphs gain over eager float, and do they give the simulation's answers?

`python -m benchmarks.fx_int8_speed [--networks resnet20,...] [--rounds 30] [--inductor]`: uniform W8A8, fp32 and int8
eager (and through Inductor) interleaved in one process, batch 1 and 8, one and two threads. Agreement is the share of
labelled images with the same top-1 class in the simulated and the lowered graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule

from benchmarks.report_table import interleaved, write
from benchmarks.zoo import NETWORKS
from fxquant import pipeline
from fxquant.api import capture, prepare
from fxquant.backends.fx_int8 import FxInt8Backend, kernel_report
from fxquant.core.data import CalibrationSet
from fxquant.core.oracle import model_outputs
from fxquant.core.settings import Settings

DEFAULT_NETWORKS = ("resnet18", "mobilenet_v2", "squeezenet", "deit_tiny", "resnet20")
CALIBRATION_IMAGES = 64
AGREEMENT_IMAGES = {"resnet20": 1017}
DEFAULT_AGREEMENT_IMAGES = 256

Row = dict[str, str | float]


def simulated(name: str, calibration: CalibrationSet) -> tuple[GraphModule, GraphModule]:
    """Return the float graph of a network and its W8A8 simulation."""
    program = prepare(capture(NETWORKS[name].factory(), calibration), Settings(bits=(8,), target="fx_int8"))
    program = pipeline.calibrate(program, calibration)
    return program.module, pipeline.simulate(program, pipeline.widest_plan(program)).module


def agreement(name: str, fake: GraphModule, lowered: GraphModule) -> Row:
    """Return how alike the answers of the simulated and the lowered graph are."""
    network = NETWORKS[name]
    if network.labelled is None:
        return {}
    images, _ = network.evaluation(AGREEMENT_IMAGES.get(name, DEFAULT_AGREEMENT_IMAGES))
    expected, made = model_outputs(fake, (images,), batch=32), model_outputs(lowered, (images,), batch=32)
    same = (expected.argmax(dim=1) == made.argmax(dim=1)).double().mean()
    # Signal to noise of the logits: a figure that no tie between two classes can flatter or spoil.
    noise = (expected - made).double().square().sum().clamp(min=1e-30)
    return {
        "agreement %": round(100 * float(same), 2),
        "SQNR dB": round(float(10 * torch.log10(expected.double().square().sum() / noise)), 1),
        "images": len(images),
    }


def speed(
    floats: GraphModule, fake: GraphModule, images: Tensor, threads: int, rounds: int, inductor: bool
) -> dict[str, float]:
    """Return median milliseconds per call of each contestant."""
    batch = (images,)
    runs: dict[str, Callable[[], object]] = {
        "fp32 ms": partial(FxInt8Backend().compile(floats, batch, threads), batch),
        "int8 ms": partial(FxInt8Backend().compile(fake, batch, threads), batch),
    }
    if inductor:
        runs["fp32 inductor ms"] = partial(FxInt8Backend(inductor=True).compile(floats, batch, threads), batch)
        runs["int8 inductor ms"] = partial(FxInt8Backend(inductor=True).compile(fake, batch, threads), batch)
    return {name: 1e3 * timing.median for name, timing in interleaved(runs, rounds).items()}


def rows_of(name: str, rounds: int, inductor: bool) -> list[Row]:
    """Return one row per batch size and number of threads."""
    calibration = CalibrationSet((NETWORKS[name].calibration(CALIBRATION_IMAGES),))
    floats, fake = simulated(name, calibration)
    lowered = FxInt8Backend().lower(fake)
    kernels = kernel_report(lowered)
    weighted = [kernel for node, kernel in kernels.items() if not node.startswith(("matmul", "bmm"))]
    shared: Row = {
        "network": name,
        "integer layers": f"{sum(not kernel.startswith('float') for kernel in weighted)}/{len(weighted)}",
        **agreement(name, fake, lowered),
    }
    rows = []
    for batch in (1, 8):
        for threads in (1, 2):
            measured = speed(floats, fake, calibration.inputs[0][:batch], threads, rounds, inductor)
            row: Row = {**shared, "batch": batch, "threads": threads}
            row |= {column: round(value, 2) for column, value in measured.items()}
            row["fp32 / int8"] = round(measured["fp32 ms"] / measured["int8 ms"], 2)
            if inductor:
                row["inductor fp32 / int8"] = round(measured["fp32 inductor ms"] / measured["int8 inductor ms"], 2)
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", default=",".join(DEFAULT_NETWORKS), help="names of benchmarks.zoo, comma-separated"
    )
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each contestant")
    parser.add_argument("--inductor", action="store_true", help="also through torch.compile (minutes of compiling)")
    chosen = parser.parse_args(arguments)
    rows = [row for name in chosen.networks.split(",") for row in rows_of(name, chosen.rounds, chosen.inductor)]
    meta = {"rounds": chosen.rounds, "calibration images": CALIBRATION_IMAGES, "precision": "W8A8", "seed": 0}
    write("fx_int8_inductor" if chosen.inductor else "fx_int8_speed", rows, meta)


if __name__ == "__main__":
    main()
