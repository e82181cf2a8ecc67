"""Does a router between two plans beat one plan of the same mean bit operations in super-resolution?

`python -m benchmarks.routed`: CARN-M x2 by `recipe="dynamic"`, scored and fitted on patches of ImageNet images. PSNR of
the exported files in ONNX Runtime on patches of 24 crops of CBSD68 and Urban100, put together again: one plan within
the limit, the routed file, and one plan within the mean bit operations that the router really spends on these crops.
"oracle" sends as many patches to the plan for hard ones as the router does, those that gain most by it, which takes the
true images to know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fxquant
from benchmarks import data
from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.zoo.carn_m import carn_m
from benchmarks.zoo.imdn import psnr
from fxquant.backends.onnx import executable
from fxquant.core.facts import Settings
from fxquant.core.ir import Program
from fxquant.core.run import gradient_magnitude
from fxquant.result import Result

FOLDER = Path("build/routed")
SIDE = 32
"""Pixels of a side of a low-resolution patch."""
PATCHES = 96
AVERAGES = (3.0, 4.0, 5.0)
"""Weight bits whose share of the bit operations of floats is the limit, activations at 8 bits."""
FLOAT_BITS = 32 * 32
ACTIVATION_BITS = 8

Row = dict[str, str | float | None]
Model = Callable[[Tensor], Tensor]


def patches_of(images: Tensor, side: int) -> Tensor:
    """Return images (N, C, H, W) cut into patches (N x rows x columns, C, side, side), row by row."""
    parts = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
    return parts.reshape(-1, images.shape[1], side, side).contiguous()


def joined(patches: Tensor, columns: int) -> Tensor:
    """Return the image (1, C, H, W) of its patches, row by row."""
    rows = [torch.cat(list(row), dim=-1) for row in torch.split(patches, columns)]
    return torch.cat(rows, dim=-2).unsqueeze(0)


def in_patches(model: Model) -> Model:
    """Return a model that takes an image (1, C, H, W) patch by patch."""

    def run(image: Tensor) -> Tensor:
        parts = patches_of(image, SIDE)
        answers = torch.cat([model(part) for part in torch.split(parts, 1)])
        return joined(answers, image.shape[3] // SIDE)

    return run


def model_of(path: Path) -> Model:
    """Return a file as a model of one input, run by one thread."""
    run = executable(path, 1)
    return lambda image: run((image,))


@dataclass(frozen=True)
class Judge:
    """PSNR on the crops: all of them, and those of Urban100."""

    pairs: list[tuple[Tensor, Tensor]]

    def figures(self, model: Model) -> Row:
        """Return the figures of a model of one patch."""
        whole = in_patches(model)
        # The second half of the crops is Urban100's.
        half = len(self.pairs) // 2
        return {"PSNR dB": psnr(whole, self.pairs), "PSNR dB, Urban100": psnr(whole, self.pairs[half:])}

    @property
    def patches(self) -> Tensor:
        """All low-resolution patches in 0..1."""
        return torch.cat([patches_of(low / 255.0, SIDE) for low, _ in self.pairs])


def oracle(hard: Model, easy: Model, judge: Judge, count: int) -> Model:
    """Return a model that gives the plan for hard patches to the `count` patches whose squared error falls most."""
    gains = []
    for low, high in judge.pairs:
        for part, truth in zip(torch.split(patches_of(low / 255.0, SIDE), 1), patches_of(high, 2 * SIDE), strict=True):
            errors = [(255.0 * model(part) - truth).pow(2).mean() for model in (easy, hard)]
            gains.append(float(errors[0] - errors[1]))
    chosen = torch.zeros(len(gains), dtype=torch.bool)
    chosen[torch.tensor(gains).argsort(descending=True)[:count]] = True
    position = iter(chosen.tolist())
    return lambda image: (hard if next(position) else easy)(image)


def static_row(result: Result, limit: float, name: str, judge: Judge) -> Row:
    """Return the figures of the one plan of a result."""
    path = FOLDER / "static.onnx"
    size = result.to_onnx(path).bytes
    used = result.costs["bops"].of(result.allocation.choices) / result.costs["bops"].float_cost
    return {"limit": limit, "network": name, **judge.figures(model_of(path)), "mean BOPs ratio": used, "bytes": size}


def rows_of(result: Result, limit: float, judge: Judge, one_plan: Callable[[float], Result]) -> list[Row]:
    """Return the rows of one limit; `one_plan` solves for another one without a router."""
    network, bops = result.routed, result.costs["bops"]
    report = network.to_onnx(FOLDER / "routed.onnx")
    alone: Mapping[str, Path] = {name: FOLDER / f"{name}.onnx" for name in network.graphs}
    for name, graph in network.graphs.items():
        _ = fxquant.export_onnx(Program(graph), alone[name])
    costs = {name: bops.of(plan.choices) / bops.float_cost for name, plan in network.plans.items()}
    chosen = gradient_magnitude(judge.patches) > network.router.threshold
    share = float(chosen.float().mean())
    spent = costs["hard"] * share + costs["easy"] * (1 - share)
    routed: Row = {"limit": limit, "network": "routed", **judge.figures(model_of(FOLDER / "routed.onnx"))}
    routed |= {"mean BOPs ratio": spent, "bytes": report.bytes, "hard share": share, "hard BOPs": costs["hard"]}
    routed |= {"easy BOPs": costs["easy"], "fitted share": network.fit.share, "fitted loss": network.fit.loss}
    routed |= {"fitted loss, one plan": network.fit.static_loss}
    hard, easy = (model_of(alone[name]) for name in ("hard", "easy"))
    # Twice, for the figures go over the crops twice.
    best: Row = {"limit": limit, "network": "oracle"}
    best |= {"PSNR dB": psnr(in_patches(oracle(hard, easy, judge, int(chosen.sum()))), judge.pairs)}
    equal = static_row(one_plan(spent), limit, "one plan of the routed BOPs", judge)
    return [static_row(result, limit, "one plan", judge), equal, routed, best | {"mean BOPs ratio": spent}]


def main() -> None:
    """Measure, print the table, write the JSON."""
    _ = asked(__doc__)
    FOLDER.mkdir(parents=True, exist_ok=True)
    began, judge = time.process_time(), Judge(data.bsd_urban())
    model = carn_m()
    images = patches_of(data.imagenet_calibration(PATCHES // 4, 2 * SIDE) / 255.0, SIDE)
    # Scores are kept: a run that was stopped goes on.
    scored = fxquant.quantize(model, images, None, recipe="dynamic", workdir=FOLDER, progress=False)
    seconds = time.process_time() - began

    def resolve(limit: float, routed: bool) -> Result:
        settings = replace(scored.program[Settings], routed=routed)
        known = replace(scored, program=scored.program.with_facts(settings))
        return fxquant.resolve(known, {"bops_ratio": limit}, progress=False)

    with torch.inference_mode():
        rows: list[Row] = [{"network": "float", **judge.figures(model)}]
    for average in AVERAGES:
        limit = average * ACTIVATION_BITS / FLOAT_BITS
        rows += rows_of(resolve(limit, True), limit, judge, partial(resolve, routed=False))
        meta = {"network": "CARN-M x2", "patches": len(images), "side": SIDE, "scoring processor s": round(seconds, 1)}
        _ = write("routed_carn_m", rows, {**meta, "crops": len(judge.pairs), "seed": 0, "threads": 1})


if __name__ == "__main__":
    main()
