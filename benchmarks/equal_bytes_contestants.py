"""Those who compete at equal bytes: each writes ONNX files of a network, one for each share of the float file.

A contestant runs in a process of its own, started with the folder that holds `model.pt2` and `calibration.npz`, and
uses nothing but the face of fxquant that it finds: so the same lines measure an older checkout, on its own PYTHONPATH.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fxquant
from fxquant.core.errors import InfeasibleBudgetError

UNIFORM = ("1.6c", "2c", "2.4c", "3c", "4", "5", "6", "8")
"""Formats that a uniform plan is written in."""

Write = Callable[[Any, Tensor, int, tuple[float, ...], Path], None]
"""(exported program, calibration images, seed, shares, where files go) -> nothing; a file is called `<what>.onnx`."""


def mixed(program: Any, images: Tensor, seed: int, ratios: tuple[float, ...], folder: Path, **options: object) -> None:
    """Quantize once, then take the best plan for each share of the float file; quantize again for other formats."""
    result = fxquant.quantize(program, images, None, progress=False, options={"seed": seed, **options})
    for ratio in ratios:
        try:
            solved = fxquant.resolve(result, fxquant.Budget(file_ratio=ratio), progress=False)
        except InfeasibleBudgetError:
            try:
                budget = fxquant.Budget(file_ratio=ratio)
                solved = fxquant.quantize(program, images, budget, progress=False, options={"seed": seed, **options})
            except InfeasibleBudgetError as error:
                print(f"{ratio}: {error}", file=sys.stderr)
                continue
        solved.to_onnx(folder / f"{ratio}.onnx")


def before(program: Any, images: Tensor, seed: int, ratios: tuple[float, ...], folder: Path) -> None:
    """Do the same with the shares that budgets knew earlier, those of the weights; files are larger than they say."""
    for ratio in ratios:
        try:
            budget = fxquant.Budget(size_ratio=ratio)
            result = fxquant.quantize(program, images, budget, progress=False, options={"seed": seed})
        except InfeasibleBudgetError as error:
            print(f"{ratio}: {error}", file=sys.stderr)
            continue
        result.to_onnx(folder / f"{ratio}.onnx")


def uniform(program: Any, images: Tensor, seed: int, ratios: tuple[float, ...], folder: Path) -> None:
    """Give all layers one format, rounded as by default."""
    for label in UNIFORM:
        # A file takes a little more than its weights.
        if not min(ratios) < float(label.rstrip("c")) / 32 + 0.015 < max(ratios) + 0.02:
            continue
        given = {"seed": seed, "pins": {"*": f"W{label}A8"}}
        budget = fxquant.Budget(average_bits=8)
        fxquant.quantize(program, images, budget, bits=(label,), progress=False, options=given).to_onnx(
            folder / f"{label}.onnx"
        )


CONTESTANTS: Mapping[str, Write] = {
    "default": mixed,
    "2c 3c 4 8": partial(mixed, bits=("2c", "3c", 4, 8)),
    "2 4 8": partial(mixed, bits=(2, 4, 8)),
    "seven formats": partial(mixed, bits=("1c", "1.6c", "2c", "2.4c", "3c", 4, 8)),
    "before": before,
    "uniform": uniform,
}
"""Name -> what it writes; the second to the fourth are the default with other candidates."""


def main() -> None:
    """Write one contestant's files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("ratios", type=float, nargs="+")
    given = parser.parse_args()
    name, folder, seed = given.name, given.folder, given.seed
    torch.set_num_threads(given.threads)
    program = torch.export.load(folder / "model.pt2")
    with np.load(folder / "calibration.npz", allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["images"])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    place = folder / f"{name}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    CONTESTANTS[name](program, images[order], seed, tuple(given.ratios), place)
    (place / "seconds").write_text(f"{time.process_time() - started:.1f}")


if __name__ == "__main__":
    main()
