"""One model of `benchmarks.coverage`: built, captured, quantized uniformly to W8A8, run in both runtimes.

Models are `zoo:NAME` of the data folder, and `timm:NAME[@OPTION=NUMBER,...]` or `torchvision:NAME` with random weights.
A failure names its stage.
"""

from __future__ import annotations

import importlib
import math
import resource
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from benchmarks.zoo import NETWORKS
from fxquant.backends.int8 import kernel_report as integer_kernels
from fxquant.backends.onnx import executable, kernel_report
from fxquant.core.errors import FxquantError, OptionError
from fxquant.core.facts import BitAllocation, Settings
from fxquant.core.ir import OPS, Choice, Program, Sites
from fxquant.core.run import first_tensor

SEED = 0
CALIBRATION_IMAGES = 8
TEST_IMAGES = 8
FREE_SIZE = 128
"""Pixels for networks that take images of any size."""
SMALLEST_SCALE = 0.1
"""Layer scales below this are drawn again: with the tiny ones that training starts from, blocks add nothing."""

Row = dict[str, Any]


def measure(name: str) -> Row:
    """Return the row of one model; `failed` names the stage that did not work, and why."""
    row: Row = {"model": name}
    started, stage = time.perf_counter(), "build"
    try:
        model, images = build(name)
        row["pixels"], row["parameters"] = images.shape[-1], sum(p.numel() for p in model.parameters())
        calibration, tests = images[:CALIBRATION_IMAGES], images[CALIBRATION_IMAGES:]
        stage = "capture"
        program = fxquant.capture(model, calibration)
        row["captured"] = True
        stage = "quantize"
        settings = Settings(bits=(8,), activation_bits=(8,))
        program = fxquant.calibrate(fxquant.prepare(program, settings), calibration, progress=False)
        plan = BitAllocation({site.name: Choice(8, 8) for site in program[Sites].sites})
        simulated = fxquant.convert(program, plan)
        row |= counted(program)
        with torch.no_grad():
            expected, answer = first_tensor(model(tests)), first_tensor(simulated.module(tests))
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
            row |= compared(executable(file, threads=1)((tests,)), answer, "onnx to simulated")
        row["onnx runs"] = True
        stage = "fx_int8"
        lowered = fxquant.lower(simulated, "fx_int8")
        with torch.no_grad():
            row |= compared(first_tensor(lowered(tests)), answer, "fx_int8 to simulated")
        kernels = {n: k for n, k in integer_kernels(lowered).items() if "float: a product" not in k}
        row["fx_int8 integer"] = sum(not kernel.startswith("float") for kernel in kernels.values())
        row["fx_int8 float"] = {n: k for n, k in kernels.items() if k.startswith("float")}
        row["fx_int8 runs"] = True
    except Exception as error:
        row["failed"] = f"{stage}: {type(error).__name__}: {str(error)[:300]}"
        row["refused clearly"] = isinstance(error, FxquantError)
    row["seconds"] = round(time.perf_counter() - started, 1)
    row["peak MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return row


def counted(program: Program) -> Row:
    """Return how many layers are on integers of how many, and why work of any kind stayed in float."""
    sites, nodes = program[Sites], {node.name: node for node in program.module.graph.nodes}
    integer = sum(len(site.nodes) for site in sites.sites)
    rules = {name: OPS.get(nodes[name].target) for name in sites.refusals}
    products = [name for name, rule in rules.items() if rule is not None and rule.weight is None]
    reasons = Counter(sites.refusals.values())
    return {
        "integer": integer,
        "layers": integer + len(sites.refusals) - len(products),
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


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model in eval mode and its images, those for calibration first.

    Raises:
        OptionError: the name says no source that is known.
    """
    source, _, model = name.partition(":")
    if source not in SOURCES:
        raise OptionError(f"model {name!r} names no source; write one of {', '.join(f'{s}:NAME' for s in SOURCES)}")
    torch.manual_seed(SEED)
    return SOURCES[source](model)


def _from_zoo(name: str) -> tuple[nn.Module, Tensor]:
    network = NETWORKS[name]
    return network.factory(), network.calibration(CALIBRATION_IMAGES + TEST_IMAGES)


def _from_timm(name: str) -> tuple[nn.Module, Tensor]:
    prepare_torchvision()
    name, _, asked = name.partition("@")
    options = {key: int(value) for key, _, value in (part.partition("=") for part in asked.split(",") if part)}
    model = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=100, **options)
    given = model.pretrained_cfg["input_size"][-1]
    fixed = model.pretrained_cfg.get("fixed_input_size") or not _takes(model, FREE_SIZE)
    size = given if fixed else FREE_SIZE
    return livelier(model, size), pictures(size)


def _takes(model: nn.Module, size: int) -> bool:
    """Whether a network runs on images of this size; some fix it without saying so."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def _from_torchvision(name: str) -> tuple[nn.Module, Tensor]:
    prepare_torchvision()
    model = importlib.import_module("torchvision.models").get_model(name, weights=None, num_classes=100)
    size = getattr(model, "image_size", FREE_SIZE)
    return livelier(model, size), pictures(size)


SOURCES = {"zoo": _from_zoo, "timm": _from_timm, "torchvision": _from_torchvision}

_DECLARED: list[object] = []


def import_sources() -> None:
    """Import the packages that models come from, as far as they are installed."""
    prepare_torchvision()
    for package in ("timm", "torchvision"):
        with suppress(ImportError):
            importlib.import_module(package)


def prepare_torchvision() -> None:
    """Declare the ops that torchvision's Python part expects; its compiled part is built for another torch here."""
    if not _DECLARED:
        libraries: Any = torch.library
        library = libraries.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)


def pictures(size: int) -> Tensor:
    """Return seeded images `(N, 3, size, size)`: smooth blobs of unlike contrast under fine noise."""
    count, generator = CALIBRATION_IMAGES + TEST_IMAGES, torch.Generator().manual_seed(SEED)
    blobs = torch.randn(count, 3, 6, 6, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator) * 2
    smooth = functional.interpolate(blobs, size=(size, size), mode="bilinear", align_corners=False)
    return smooth + 0.2 * torch.randn(count, 3, size, size, generator=generator)


def livelier(model: nn.Module, size: int) -> nn.Module:
    """Return a model in eval mode whose random weights let something through, as a trained one's would.

    Batch norms learn their statistics from images; scales and gains that start at (nearly) nothing are drawn again.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            tiny = bool(parameter.abs().max() < SMALLEST_SCALE) and bool(parameter.max() == parameter.min())
            gain = path.endswith("weight") or float(parameter.abs().max()) > 0
            if tiny and gain:
                parameter.uniform_(0.2, 0.6, generator=generator)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        if norms:
            model(pictures(size)[:CALIBRATION_IMAGES])
    return model.eval()
