"""What limits on answers give: the cheapest plan that keeps them with confidence, and what it keeps on other images.

`python -m benchmarks.answer_limits [network ...]`: each limit is one call of `fxquant.quantize`, by images that the
network was trained on and by others, for each seed; the same is then measured on labelled images that no call saw.
"""

from __future__ import annotations

import tempfile
import time

import torch
from torch import Tensor

import fxquant
from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from fxquant.core.errors import FxquantError
from fxquant.core.run import model_outputs, quality
from fxquant.report import average_bits

SEEDS = (0, 1, 2)
"""Of the images that are drawn."""
LIMITS = ({"disagreement": 0.02}, {"disagreement": 0.05}, {"disagreement": 0.1}, {"loss": 0.05})
CASES = {"resnet20": 600, "mobilenet_v2": 600}
"""Network -> calibration images, up to half of which judge the answers."""
EFFORT = "fast"

Row = dict[str, str | float | None]


def measured(name: str, seed: int) -> list[Row]:
    """Return a row for each kind of calibration images and each limit."""
    network, count = NETWORKS[name], CASES[name]
    images, labels = network.evaluation()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    mine, others = order[:count], order[count:]
    kinds = {"trained on": network.calibration(count), "not trained on": images[mine]}
    rows: list[Row] = []
    for kind, calibration in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            for limit in LIMITS:
                row: Row = {"network": name, "images": kind, "seed": float(seed)}
                rows.append(row | _limited(name, limit, calibration, (images[others], labels[others]), folder))
    return rows


def _limited(
    name: str, limit: dict[str, float], calibration: Tensor, others: tuple[Tensor, Tensor], folder: str
) -> Row:
    """Return what one call finds, and what its plan does to other images."""
    row: Row = {"limit": ", ".join(f"{key} {value:g}" for key, value in limit.items())}
    began = time.monotonic()
    try:
        result = fxquant.quantize(
            NETWORKS[name].factory(),
            calibration,
            limit,
            options={"seed": 0, "effort": EFFORT},
            workdir=folder,
            progress=False,
        )
    except FxquantError as error:
        return row | {"plan": str(error)[:140]}
    plan, (images, labels) = result.allocation, others
    reference, output = (model_outputs(graph, (images,)) for graph in (result.program.module, result.simulated))
    found = quality(("disagreement", "accuracy_drop", "loss"), reference, output, labels, "kl")
    row |= {f"held out, {key}": value for key, value in plan.quality.items()}
    row |= {f"bound, {key}": value for key, value in plan.quality_bounds.items()}
    row |= {f"others, {key}": measure.value for key, measure in found.items()}
    row |= {"judged on": float(plan.quality_images), "learned by heart": "said" if plan.notes else ""}
    row |= {"stored bits": average_bits(result.program, plan), "size of float": plan.used["size_ratio"]}
    return row | {"plan": plan.estimator, "seconds": time.monotonic() - began}


def main() -> None:
    """Measure, print the table, write the JSON."""
    torch.set_num_threads(1)
    rows = [row for name in asked(__doc__, "network", CASES) for seed in SEEDS for row in measured(name, seed)]
    write("answer_limits", rows, {"seeds": str(SEEDS), "cases": str(CASES), "effort": EFFORT, "confidence": 0.95})


if __name__ == "__main__":
    main()
