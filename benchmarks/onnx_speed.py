"""Is the ONNX file small enough, as exact as the simulation, and no slower than `quantize_static`?

`python -m benchmarks.onnx_speed [network ...]`: the float file, our W8A8 and 4-bit files, the same 4-bit plan stored in
bytes, and onnxruntime's own `quantize_static` (QDQ, per channel, uint8 x int8) made from our float file; one image, one
thread, all interleaved in one run. A step is 1/255 of the range of the simulated logits.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from torch import Tensor

from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from fxquant.api import calibrate, capture, prepare
from fxquant.backends import Executable, backend
from fxquant.backends.onnx import OnnxOptions, executable, export_onnx, kernel_report, to_onnx
from fxquant.core.facts import BitAllocation, Settings
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import CalibrationSet, model_outputs
from fxquant.passes import simulate

DEFAULT = ("resnet20", "mobilenet_v2", "squeezenet", "deit_tiny")
CALIBRATION_IMAGES = 32
PARITY_IMAGES = {"resnet20": 1000}
ROUNDS = 40

Row = dict[str, str | float | int | None]


class Images:
    """Hands calibration images to quantize_static one at a time."""

    def __init__(self, name: str, images: Tensor) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter(
            [{name: images[k : k + 1].numpy()} for k in range(len(images))]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next image, None at the end."""
        return next(self._batches, None)


def statically_quantized(float_file: Path, images: Tensor) -> bytes:
    """Return onnxruntime's own quantization of a float file."""
    target = float_file.with_name("static.onnx")
    reader = Images(onnx.load(float_file).graph.input[0].name, images)
    logging.getLogger().setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_static(
            float_file,
            target,
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return target.read_bytes()


def plan(program: Program, bits: int) -> BitAllocation:
    """Return the plan with every weight at `bits` and every activation at 8."""
    return BitAllocation({site.name: Choice(bits, 8) for site in program[Sites].sites})


def parity(answer: Tensor, expected: Tensor, label: str) -> Row:
    """Return how far two logits are apart, in steps of 1/255 of the expected range, and how often top-1 agrees (%)."""
    error = (answer - expected).abs() / ((expected.max() - expected.min()) / 255)
    agree = (answer.argmax(dim=1) == expected.argmax(dim=1)).double().mean()
    return {
        f"mean step {label}": round(float(error.mean()), 3),
        f"max step {label}": round(float(error.max()), 2),
        f"top-1 % {label}": round(100 * float(agree), 2),
    }


def in_batches(run: Executable, images: Tensor, size: int = 25) -> Tensor:
    """Return the answers for many images."""
    return torch.cat([run((images[k : k + size],)) for k in range(0, len(images), size)])


def milliseconds(models: dict[str, bytes], image: Tensor) -> dict[str, tuple[float, float]]:
    """Return wall and processor milliseconds of one image on one thread, medians of interleaved rounds.

    Processor time is what remains comparable on a machine that others use too.
    """
    runs = {name: executable(model, threads=1) for name, model in models.items()}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-3, ROUNDS):
        for name, run in runs.items():
            started, used = time.perf_counter(), time.process_time()
            run((image,))
            if turn >= 0:
                wall[name].append(1000 * (time.perf_counter() - started))
                busy[name].append(1000 * (time.process_time() - used))
    return {name: (statistics.median(wall[name]), statistics.median(busy[name])) for name in runs}


def measure(name: str) -> list[Row]:
    """Return the rows of one network."""
    network = NETWORKS[name]
    images = network.evaluation(PARITY_IMAGES.get(name, 300))[0]
    calibration = CalibrationSet((network.calibration(CALIBRATION_IMAGES),))
    program = calibrate(prepare(capture(network.factory(), calibration), Settings(bits=(4, 8))), [calibration.inputs])
    graphs = {bits: simulate(program, plan(program, bits)).module for bits in (8, 4)}
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(program.module, Path(folder) / "float.onnx").path
        models = {"float": file.read_bytes(), "quantize_static": statically_quantized(file, calibration.inputs[0])}
    models["W8A8"] = to_onnx(graphs[8]).SerializeToString()
    models["W4A8"] = to_onnx(graphs[4]).SerializeToString()
    models["W4A8 in bytes"] = to_onnx(graphs[4], options=OnnxOptions(packed=False)).SerializeToString()
    timing = milliseconds(models, images[:1])
    rows = []
    answers = {key: in_batches(executable(model), images) for key, model in models.items()}
    for key, model in models.items():
        report = kernel_report(model)
        row: Row = {
            "network": name,
            "file": key,
            "bytes": len(model),
            "x float bytes": round(len(model) / len(models["float"]), 3),
            "wall ms": round(timing[key][0], 2),
            "cpu ms": round(timing[key][1], 2),
            "x float cpu": round(timing["float"][1] / timing[key][1], 2),
            "integer %": round(100 * report.integer_share, 1) if key != "quantize_static" else None,
            "float products": report.float_products,
            "Q/DQ left": report.conversions,
        }
        if key in ("W8A8", "W4A8"):
            graph = graphs[int(key[1])]
            row |= parity(answers[key], model_outputs(graph, (images,)), "of simulation")
            reference = backend("reference").compile(graph, (images,))
            row |= parity(answers[key], in_batches(reference, images), "of reference")
        rows.append(row)
    assert torch.equal(answers["W4A8"], answers["W4A8 in bytes"])
    return rows


def main() -> None:
    """Measure, print the table, write the JSON."""
    torch.set_num_threads(1)
    names = asked(__doc__, "network", DEFAULT)
    rows = [row for name in names for row in measure(name)]
    write("onnx_speed", rows, {"calibration_images": CALIBRATION_IMAGES, "rounds": ROUNDS, "threads": 1, "batch": 1})


if __name__ == "__main__":
    main()
