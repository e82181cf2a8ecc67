"""What quantized activations cost, which of them, and what the observer changes.

`python -m benchmarks.activation_ranges [case ...]`: all layers at one precision, weights rounded to nearest, ranges by
four observers; measured on images that no step saw (in dB on Set5, at 4 bits on crops of CBSD68 and Urban100; test
images in percent). For super-resolution the values that cost most, each quantized alone, are named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import data
from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from benchmarks.zoo.carn_m import carn_m
from benchmarks.zoo.imdn import imdn, psnr, set5_psnr
from fxquant import flow
from fxquant.capture import capture
from fxquant.core.facts import BitAllocation, FakeQuantNodes, Settings
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import CalibrationSet, GraphReplay
from fxquant.passes import simulate

CROP = 48
"""Side of the squares of Set5's images that are restored; calibration images are cut to it, too."""
CROPS = 3
"""Every third crop of CBSD68 and Urban100 is restored at 4 bits."""
WORST = 4
"""Values that are named."""

Row = dict[str, str | float | int]
OBSERVERS = ("minmax", "percentile", "mse", "gaussian")
Runs = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A network at one precision.

    Args:
        factory: builds it.
        choice: of all layers.
        target: what executes it.
        calibration: returns the images.
        quality: returns what a model keeps, in `unit`, on held-out images.
        unit: of the quality.
    """

    factory: Callable[[], nn.Module]
    choice: Choice
    target: str
    calibration: Callable[[], Tensor]
    quality: Callable[[Runs], float]
    unit: str


def _restored(model: Runs) -> float:
    return set5_psnr(model, CROP)


def _textures(model: Runs) -> float:
    return psnr(model, data.bsd_urban()[::CROPS])


def _small_images() -> Tensor:
    return data.imagenet_calibration(48, 64) / 255.0


def _classified(name: str, tests: int) -> Callable[[Runs], float]:
    def quality(model: Runs) -> float:
        with torch.inference_mode():
            return data.accuracy(model, *NETWORKS[name].evaluation(tests))

    return quality


def _crops() -> Tensor:
    return data.low_resolution()[:, :, 24 : 24 + CROP, 24 : 24 + CROP].contiguous() / 255.0


def _classes(name: str, choice: Choice, target: str, images: int, tests: int) -> Case:
    network = NETWORKS[name]
    return Case(network.factory, choice, target, lambda: network.calibration(images), _classified(name, tests), "%")


CASES = {
    "imdn": Case(imdn, Choice(8, 8), "onnxruntime", _crops, _restored, "dB"),
    "carn_m": Case(carn_m, Choice(8, 8), "onnxruntime", _crops, _restored, "dB"),
    "imdn W4A4": Case(imdn, Choice(4, 4), "fx_int8", _small_images, _textures, "dB"),
    "carn_m W4A4": Case(carn_m, Choice(4, 4), "fx_int8", _small_images, _textures, "dB"),
    "resnet20": _classes("resnet20", Choice(4, 4), "fx_int8", 192, 1017),
    "mobilenet_v2": _classes("mobilenet_v2", Choice(8, 8), "onnxruntime", 64, 200),
}


def measured(name: str) -> list[Row]:
    """Return a row for each way of choosing ranges."""
    case, images = CASES[name], CalibrationSet((CASES[name].calibration(),))
    captured, floating = capture(case.factory(), images.slice(0, 2).inputs), case.quality(case.factory())
    rows: list[Row] = []
    for observer in OBSERVERS:
        settings = Settings(
            bits=(int(case.choice.weight_bits),),
            activation_bits=(case.choice.activation_bits,),
            target=case.target,
            observer=observer,
            effort="fast",
            # Weights that are rounded well take their rounding along when their quantizer is off.
            scoring_rounding="nearest",
        )
        program = flow.calibrate(flow.prepare(captured, settings), images)
        rows.append(_row(name, observer, program, floating))
    return rows


def _row(name: str, ranges: str, program: Program, floating: float) -> Row:
    case = CASES[name]
    simulated = simulate(program, BitAllocation({site.name: case.choice for site in program[Sites].sites}))
    replay, nodes = GraphReplay(simulated.module), simulated[FakeQuantNodes]
    weights = {node for names in nodes.weights.values() for node in names}
    activations = {node for names in nodes.activations.values() for node in names}

    def lost(off: set[str]) -> float:
        passed = dict.fromkeys(off, lambda value: value)
        return floating - case.quality(lambda x: replay.forward((x,), passed, frozenset())[0])

    row: Row = {"network": name, "plan": case.choice.label, "ranges": ranges, "float": floating, "unit": case.unit}
    row |= {"lost": lost(set()), "lost, weights": lost(activations), "lost, activations": lost(weights)}
    if case.unit == "dB" and case.choice.weight_bits == 8 and ranges == "mse":
        alone = {group: lost((weights | activations) - set(names)) for group, names in nodes.activations.items()}
        worst = sorted(alone, key=alone.__getitem__, reverse=True)[:WORST]
        row["worst alone"] = ", ".join(f"{group} {alone[group]:.3f}" for group in worst)
    return row


def main() -> None:
    """Measure the cases named on the command line, or all."""
    torch.set_num_threads(1)
    names = asked(__doc__, "case", CASES)
    rows = [row for name in names for row in measured(name)]
    write("activation_ranges", rows, {"crop": CROP, "cases": ", ".join(names)})


if __name__ == "__main__":
    main()
