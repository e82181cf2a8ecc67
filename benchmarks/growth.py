"""How do the seconds and the memory of each stage grow with layers, images and widths?

`python -m benchmarks.growth [layers] [images] [widths]`: CIFAR networks of 20, 56 and 110 layers with random weights
where there are none; ResNet-20 with 64 to 256 images; ResNet-20 with 2 to 6 widths. Processor seconds on one thread;
the last rows hold the exponents, `log(last / first)` over the same of what grows. Linux only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fxquant
from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.stage_clock import StageClock
from benchmarks.zoo import NETWORKS
from benchmarks.zoo.cifar_resnet import CifarResNet, resnet20

STAGES = ("capture", "calibrate", "grids", "score", "solve", "verify", "round")
OPTIONS: Mapping[str, Any] = {"estimators": ("gram",), "rounding": "qronos_rescaled", "curve": 0, "refine_moves": 0}
WIDTHS = (8, 4, 2, 6, 3, 5)
LEAST = 0.05
"""Seconds below which a stage has no exponent: what it takes then is set-up."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        layers: of the network.
        images: calibration images.
        bits: candidate widths.
    """

    layers: int = 20
    images: int = 64
    bits: tuple[int, ...] = field(default=(2, 4, 8))


SERIES: dict[str, tuple[Case, ...]] = {
    "layers": tuple(Case(layers=layers, images=32) for layers in (20, 56, 110)),
    "images": tuple(Case(images=images) for images in (64, 128, 256)),
    "widths": tuple(Case(bits=WIDTHS[:count]) for count in (2, 3, 4, 6)),
}
"""What grows -> the runs, the smallest first."""


def network(layers: int) -> nn.Module:
    """Return the CIFAR network of so many layers; all but the shallowest have seeded random weights."""
    torch.manual_seed(0)
    return resnet20() if layers == 20 else CifarResNet((layers - 2) // 6).eval()


def measured(series: str, case: Case) -> Row:
    """Return the processor seconds of each stage of a run, and the peak memory of the process in each."""
    clock, images = StageClock(), NETWORKS["resnet20"].calibration(case.images)
    # All images are scored on: the effort that scores on most of them.
    options = {**OPTIONS, "bits": case.bits, "effort": "best", "rounds": 0}
    with clock.quantizing(), clock.stage("capture"):
        _ = fxquant.quantize(network(case.layers), images, "average_bits=5", progress=False, options=options)
    row: Row = {"series": series, "layers": case.layers, "images": case.images, "widths": len(case.bits)}
    row |= {stage: round(clock.taken[stage][0], 3) for stage in STAGES}
    return row | {"peak MB": round(max(taken[2] for taken in clock.taken.values()))}


def exponents(series: str, rows: Sequence[Row]) -> Row:
    """Return by which power of what grows each column grows."""
    first, last = rows[0], rows[-1]
    grown = math.log(last[series] / first[series])
    row: Row = {"series": f"exponent of {series}"}
    for column in (*STAGES, "peak MB"):
        known = min(first[column], last[column]) > LEAST
        row[column] = round(math.log(last[column] / first[column]) / grown, 2) if known else None
    return row


def main() -> None:
    """Measure, print the table, write the JSON."""
    chosen = asked(__doc__, "series", SERIES)
    torch.set_num_threads(1)
    # The first run of a process sets up what later ones find.
    _ = measured("layers", Case(images=8, bits=(4, 8)))
    rows: list[Row] = []
    for series in chosen:
        found = [measured(series, case) for case in SERIES[series]]
        rows += [*found, exponents(series, found)]
        print(rows[-1], flush=True)
    write("growth", rows, {"threads": 1, "seed": 0, "options": {k: str(v) for k, v in OPTIONS.items()}})


if __name__ == "__main__":
    main()
