"""One model of `benchmarks.coverage`: built, captured, quantized uniformly to W8A8, run in both runtimes.

Models are those of `benchmarks.coverage_sources`. A failure names its stage.
"""

from __future__ import annotations

import math
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxquant
from benchmarks.coverage_sources import CALIBRATION_IMAGES, build
from fxquant.backends.int8 import kernel_report as integer_kernels
from fxquant.backends.onnx import executable, kernel_report
from fxquant.core.errors import FxquantError, MissingDependencyError
from fxquant.core.facts import BitAllocation, Settings
from fxquant.core.ir import OPS, Choice, Program, Sites
from fxquant.core.run import first_tensor

Row = dict[str, Any]


def measure(name: str) -> Row:
    """Return the row of one model; `failed` names the stage that did not work, and why."""
    row: Row = {"model": name}
    started, stage = time.perf_counter(), "build"
    try:
        model, inputs = build(name)
        row["pixels"], row["parameters"] = inputs[0].shape[-1], sum(p.numel() for p in model.parameters())
        calibration = tuple(values[:CALIBRATION_IMAGES] for values in inputs)
        tests = tuple(values[CALIBRATION_IMAGES:] for values in inputs)
        stage = "capture"
        program = fxquant.capture(model, [calibration])
        row["captured"] = True
        stage = "quantize"
        settings = Settings(bits=(8,), activation_bits=(8,))
        program = fxquant.calibrate(fxquant.prepare(program, settings), [calibration], progress=False)
        plan = BitAllocation({site.name: Choice(8, 8) for site in program[Sites].sites})
        simulated = fxquant.convert(program, plan)
        row |= counted(program)
        with torch.no_grad():
            expected, answer = first_tensor(model(*tests)), first_tensor(simulated.module(*tests))
        row |= compared(answer, expected, "simulated to float")
        stage = "onnx"
        with tempfile.TemporaryDirectory() as folder:
            file = fxquant.export_onnx(simulated, Path(folder) / "model.onnx")
            report = kernel_report(file)
            row["onnx integer"], row["onnx layers"] = (
                len(report.kernels) - len(report.float_layers),
                len(report.kernels),
            )
            row["onnx float layers"] = list(report.float_layers)
            row |= compared(executable(file, threads=1)(tests), answer, "onnx to simulated")
        row["onnx runs"] = True
        stage = "fx_int8"
        lowered = fxquant.lower(simulated, "fx_int8")
        with torch.no_grad():
            row |= compared(first_tensor(lowered(*tests)), answer, "fx_int8 to simulated")
        kernels = {n: k for n, k in integer_kernels(lowered).items() if "float: a product" not in k}
        row["fx_int8 integer"] = sum(not kernel.startswith("float") for kernel in kernels.values())
        row["fx_int8 float"] = {n: k for n, k in kernels.items() if k.startswith("float")}
        row["fx_int8 runs"] = True
    except MissingDependencyError as error:
        return {**row, "skipped": str(error)}
    except Exception as error:
        row["failed"] = f"{stage}: {type(error).__name__}: {str(error)[:300]}"
        row["refused clearly"] = isinstance(error, FxquantError)
    row["seconds"] = round(time.perf_counter() - started, 1)
    row["peak MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return row


def counted(program: Program) -> Row:
    """Return how many layers are on integers of how many, and why work of any kind stayed in float."""
    sites, nodes = program[Sites], {node.name: node for node in program.module.graph.nodes}
    integer = sum(len(site.nodes) for site in sites.sites if not site.stored)
    stored = sum(site.stored for site in sites.sites)
    rules = {name: OPS.get(nodes[name].target) for name in sites.refusals}
    products = [name for name, rule in rules.items() if rule is not None and rule.weight is None]
    reasons = Counter(sites.refusals.values())
    if stored:
        reasons["weights stored as integers, computed in float"] = stored
    return {
        "integer": integer,
        "layers": integer + stored + len(sites.refusals) - len(products),
        "products in float": len(products),
        "in float": dict(reasons),
    }


def compared(answer: Tensor, expected: Tensor, label: str) -> Row:
    """Return the signal-to-noise ratio in dB of an answer's variation over the images, and top-1 agreement (%)
    of class scores.

    `10 log10(sum (y - mean y)^2 / sum (y' - y)^2)`: what all images have in common would flatter it.
    """
    signal = (expected - expected.mean(dim=0)).double().square().sum()
    noise = (answer - expected).double().square().sum()
    ratio = 10 * math.log10(max(float(signal), 1e-30) / max(float(noise), 1e-30))
    row: Row = {f"SQNR dB {label}": round(min(ratio, 200.0), 1)}
    if expected.dim() == 2:
        agree = (answer.argmax(dim=1) == expected.argmax(dim=1)).double().mean()
        row[f"top-1 % {label}"] = round(100 * float(agree), 1)
    return row
