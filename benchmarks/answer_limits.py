"""What limits on the answers give: the cheapest plan that keeps them on held-out images, and what it keeps on others.

`python -m benchmarks.answer_limits [network ...]`: each limit is one call of `fxquant.quantize` at its default effort;
the same is then measured on labelled test images that no step saw, where a limit met on a few hundred held-out images
may be missed by their noise, and by how well the network knew its calibration images.
"""

from __future__ import annotations

import tempfile
import time

import torch

import fxquant
from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from fxquant.core.errors import FxquantError
from fxquant.core.run import model_outputs, quality
from fxquant.report import average_bits

SEED = 0
LIMITS = ({"disagreement": 0.01}, {"disagreement": 0.02}, {"disagreement": 0.05}, {"loss": 0.05})
CASES = {"resnet20": (384, 1017), "mobilenet_v1": (384, 500)}
"""Network -> calibration images, of which a quarter decides; test images."""

Row = dict[str, str | float | None]


def measured(name: str, folder: str) -> list[Row]:
    """Return a row for each limit."""
    network, (count, tests) = NETWORKS[name], CASES[name]
    images, labels = network.evaluation(tests)
    calibration = network.calibration(count)
    model = network.factory()
    rows: list[Row] = []
    for limit in LIMITS:
        asked = ", ".join(f"{key} {value}" for key, value in limit.items())
        row: Row = {"network": name, "limit": asked}
        rows.append(row)
        began = time.monotonic()
        try:
            result = fxquant.quantize(
                model, calibration, fxquant.Budget.of(limit), options={"seed": SEED}, workdir=folder, progress=False
            )
        except FxquantError as error:
            row["plan"] = str(error)[:140]
            continue
        plan = result.allocation
        reference, output = (model_outputs(graph, (images,)) for graph in (result.program.module, result.simulated))
        found = quality(("disagreement", "accuracy_drop", "loss"), reference, output, labels, "kl")
        row |= {f"held out, {key}": value for key, value in plan.quality.items()}
        row |= {f"bound, {key}": value for key, value in plan.quality_bounds.items()}
        row["judged on"] = plan.quality_images
        row |= {f"test, {key}": measure.value for key, measure in found.items()}
        row |= {"average bits": average_bits(result.program, plan), "size of float": plan.used["size_ratio"]}
        row |= {"plan": plan.estimator, "seconds": time.monotonic() - began}
    return rows


def main() -> None:
    """Measure, print the table, write the JSON."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in asked(__doc__, "network", CASES):
        with tempfile.TemporaryDirectory() as folder:
            rows += measured(name, folder)
    write("answer_limits", rows, {"seed": SEED, "cases": str(CASES), "bits": "2, 4, 8"})


if __name__ == "__main__":
    main()
