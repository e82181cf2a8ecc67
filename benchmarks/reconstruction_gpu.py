"""How long does a step of learned rounding take on a GPU, and what share of the GPU's peak is that?

`python -m benchmarks.reconstruction_gpu [device]`: units of ResNet-18 (random weights: only the shape counts) and
MobileNetV2 at W4A4, with the settings of `qdrop`, alone and with the prediction difference through the float suffix.
The plan is made on the CPU; a unit, its suffix and the values it is tuned on then move to the device. A step's
arithmetic is counted by PyTorch's flop counter; the peak is that of a large float32 matrix product, measured here.
Without a GPU it says so and writes nothing; with `cpu` as the device it runs, and writes nothing either.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arguments import asked
from benchmarks.report_table import table, write
from benchmarks.zoo import NETWORKS
from fxquant import flow
from fxquant.api import capture, prepare
from fxquant.core.facts import BitAllocation, Settings
from fxquant.core.ir import Choice, Sites
from fxquant.core.run import CalibrationSet
from fxquant.passes.rounding import RoundingTask
from fxquant.passes.rounding.learned import (
    PROFILES,
    Draw,
    Material,
    Outcome,
    Reconstruction,
    Reconstructor,
    Source,
    Tuner,
)

IMAGES = 64
UNITS = (1, -3)
"""Positions of the units that are timed: an early one with large images, and a late one with many channels."""
STEPS, TURNS = 10, 5
SIDE = 4096
"""Of the matrices whose product gives the peak."""
QDROP = replace(PROFILES["qdrop"].stages["qdrop"], iterations=STEPS)
SETTINGS = {"qdrop": QDROP, "with prediction": replace(QDROP, prediction=0.1)}

Row = dict[str, str | float]


def task_of(network: str) -> RoundingTask:
    """Return a network's uniform W4A4 plan on the CPU."""
    images = CalibrationSet((NETWORKS[network].calibration(IMAGES),))
    settings = Settings(bits=(4, 8), activation_bits=(4, 8), target="fx_int8", estimators=("diagonal",), rounds=0)
    program = flow.calibrate(prepare(capture(NETWORKS[network].factory(), images), settings), images)
    plan = BitAllocation({site.name: Choice(4, 4) for site in program[Sites].sites})
    return RoundingTask(program.with_facts(plan), images, None)


def tuner_on(task: RoundingTask, options: Reconstruction, position: int, device: torch.device) -> tuple[str, Tuner]:
    """Return the name of the unit at a position and its loop, whose modules and values are on the device."""
    engine = Reconstructor(task, options, "gpu")
    # What is drawn at random is drawn where it is used.
    engine.device = device
    names = [node.name for node in engine.module.graph.nodes if node.op == "placeholder"]
    given = dict(zip(names, task.images.inputs, strict=True))
    quantized, floats = Source(given, torch.float32), Source(given, torch.float32)
    index = position % len(engine.units)
    for earlier in range(index):
        cut = engine.cut(earlier)
        needed = {name for unit in engine.units[earlier + 1 :] for name in unit.inputs}
        quantized.advance(engine.nearest(cut, Outcome()), needed)
        floats.advance(cut.floats, needed)
    made = engine.tuner(engine.cut(index), Outcome(), quantized, floats)
    for span in (made.pieces.unit, made.pieces.nearest, made.pieces.suffix):
        if span is not None:
            assert isinstance(span.module, nn.Module)
            span.module.to(device)
    known, every = made.material, torch.arange(made.material.images)
    draws = (known.quantized, known.floats, known.targets, known.answers)
    material = Material(known.images, *(_kept(draw, every, device) for draw in draws))
    return engine.units[index].name, Tuner(made.pieces, material, options, 0, made.generator)


def _kept(draw: Draw, every: Tensor, device: torch.device) -> Draw:
    values = {name: value.to(device) for name, value in draw(every).items()}
    return lambda index: {name: value[index] for name, value in values.items()}


def finished(device: torch.device) -> float:
    """Return the time when the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(tuner: Tuner, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a step, the median over turns, and its floating-point operations."""
    with FlopCounterMode(display=False) as counted:
        _ = tuner.run()
    seconds = []
    for _ in range(TURNS):
        started = finished(device)
        _ = tuner.run()
        seconds.append((finished(device) - started) / STEPS)
    return statistics.median(seconds), counted.get_total_flops() / STEPS


def peak(device: torch.device) -> float:
    """Return the float32 operations per second of a matrix product."""
    a, b = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))
    seconds = []
    for _ in range(TURNS):
        started = finished(device)
        _ = a @ b
        seconds.append(finished(device) - started)
    return 2 * SIDE**3 / min(seconds)


def main() -> None:
    """Measure, print the table, write the JSON."""
    name = asked(__doc__, "device", ("cuda",))[0]
    if name == "cuda" and not torch.cuda.is_available():
        print("skipped: PyTorch sees no GPU on this machine; `cpu` as the device shows that it runs")
        return
    device, rows = torch.device(name), list[Row]()
    highest = peak(device)
    for network in ("resnet18", "mobilenet_v2"):
        task = task_of(network)
        for label, options in SETTINGS.items():
            for position in UNITS:
                unit, tuner = tuner_on(task, options, position, device)
                seconds, flops = timed(tuner, device)
                row: Row = {"network": network, "settings": label, "unit": unit, "step ms": 1e3 * seconds}
                rows.append({**row, "Gflop": flops / 1e9, "share of peak %": 100 * flops / seconds / highest})
                print(rows[-1], flush=True)
    if device.type == "cuda":
        write("reconstruction_gpu", rows, {"device": torch.cuda.get_device_name(device), "peak flop/s": highest})
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
