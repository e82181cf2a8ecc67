"""Do more channels, or fewer, beat other widths at equal bytes and at equal milliseconds?

`python -m benchmarks.new_channels [expand|prune]`: ResNet-20 on CIFAR-10, activations at 8 bits, everything but the
channels alike: losses of single choices, linear program, GPTQ. `expand`: one width of 2 or 3 bits with 10 and 25 % more
weights, against mixed widths of as many bits. `prune`: 3 bits on average with and without shares of channels left out,
and 8 bits within fewer bit operations. Accuracy, KL from the float network and milliseconds of
one image are of the ONNX files in ONNX Runtime on one thread, on images that nothing was tuned on. Finished rows are
kept in `build/new_channels`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fxquant
from benchmarks import data
from benchmarks.arguments import asked
from benchmarks.report_table import interleaved, write
from benchmarks.zoo import NETWORKS
from fxquant.backends.onnx import executable
from fxquant.core.ir import Sites
from fxquant.core.run import LOSSES
from fxquant.core.storage import read_json, write_json

FOLDER = Path("build/new_channels")
IMAGES, EVALUATED = 128, 1017
ROUNDS = 60
"""Timed runs of one image."""
MIXED = (2, 3, 4, 8)

Row = dict[str, str | float | None]


@dataclass(frozen=True)
class Contestant:
    """One network of the table.

    Args:
        part: "expand" or "prune".
        name: in the table.
        recipe: of `fxquant.recipes`; "zeroq" scores and solves as the other two do.
        bits: candidate widths.
        budget: the limit.
        rounding: of the chosen plan.
    """

    part: str
    name: str
    recipe: str
    bits: tuple[int, ...]
    budget: str
    rounding: str = "gptq"


def _expanded(width: int, more: float) -> list[Contestant]:
    limit, shown = f"average_bits={width * (1 + more):g}", f"{100 * more:.0f} % more"
    return [
        Contestant("expand", f"{width} bits, {shown}, split", "expand", (width,), limit),
        Contestant("expand", f"mixed, {shown} than {width} bits", "zeroq", MIXED, limit),
    ]


CONTESTANTS = (
    *(Contestant("expand", f"{width} bits", "zeroq", (width,), f"average_bits={width}") for width in (2, 3)),
    *(each for width in (2, 3) for more in (0.1, 0.25) for each in _expanded(width, more)),
    Contestant("expand", "mixed and split, 10 % more than 3 bits", "expand", MIXED, "average_bits=3.3"),
    Contestant("prune", "8 bits", "zeroq", (8,), "average_bits=8"),
    Contestant("prune", "8 bits, 3/4 of the bit operations", "prune", (8,), f"bops_ratio={0.75 / 16}"),
    Contestant("prune", "8 bits, 3/5 of the bit operations", "prune", (8,), f"bops_ratio={0.6 / 16}"),
    Contestant("prune", "mixed, 3/5 of the bit operations", "zeroq", MIXED, f"bops_ratio={0.6 / 16}"),
    Contestant("prune", "mixed, 3 bits", "zeroq", MIXED, "average_bits=3"),
    Contestant("prune", "mixed and pruned, 3 bits", "prune", MIXED, "average_bits=3"),
    Contestant("expand", "2 bits, scales searched", "zeroq", (2,), "average_bits=2", "gptq_rescaled"),
    Contestant(
        "expand", "2 bits, 25 % more, split, scales searched", "expand", (2,), "average_bits=2.5", "gptq_rescaled"
    ),
)


@dataclass(frozen=True)
class Judge:
    """Measures files on images that nothing was tuned on."""

    images: Tensor
    labels: Tensor
    reference: Tensor

    @staticmethod
    def of() -> Judge:
        """Return the judge."""
        network = NETWORKS["resnet20"]
        images, labels = network.evaluation(EVALUATED)
        with torch.inference_mode():
            return Judge(images, labels, torch.cat([network.factory()(part) for part in torch.split(images, 64)]))

    def figures(self, path: Path) -> Row:
        """Return accuracy in per cent, and KL in nats."""
        run = executable(path, 1)
        answers = torch.cat([run((part,)) for part in torch.split(self.images, 64)])
        right = float((answers.argmax(dim=1) == self.labels).double().mean())
        return {"accuracy %": 100 * right, "KL": float(LOSSES["kl"](self.reference, answers).mean())}


def file_of(contestant: Contestant) -> Path:
    """Return where a contestant's file is kept."""
    return FOLDER / f"{CONTESTANTS.index(contestant)}.onnx"


def measured(contestant: Contestant, judge: Judge) -> Row:
    """Return the row of a contestant, but for its time."""
    network, began = NETWORKS["resnet20"], time.process_time()
    options = {
        "bits": contestant.bits,
        "scoring_rounding": "gptq",
        "rounding": contestant.rounding,
        "curve": 0,
        "seed": 0,
    }
    calibration = [(network.calibration(IMAGES), data.cifar10_calibration_labels(IMAGES))]
    recipe, model = contestant.recipe, network.factory()
    run = partial(fxquant.quantize, model, calibration, recipe=recipe, options=options, progress=False)
    if contestant.bits == MIXED and recipe == "zeroq":
        # Scored once for all limits.
        if not (FOLDER / "mixed" / "result.json").is_file():
            _ = run(budget=None).save(FOLDER / "mixed")
        result = fxquant.resolve(FOLDER / "mixed", contestant.budget, progress=False)
    else:
        result = run(budget=contestant.budget)
    spent = time.process_time() - began
    path = file_of(contestant)
    size = result.to_onnx(path).bytes
    sites = result.program[Sites].sites
    bits = sum(site.weight_count * result.allocation.choices[site.name].weight_bits for site in sites)
    macs = sum(site.macs for site in sites)
    notes = [note for note in result.allocation.notes if "channel" in note]
    row: Row = {"part": contestant.part, "network": contestant.name, **judge.figures(path), "bytes": size}
    row |= {"weight bits kB": bits / 8000, "million MACs": macs / 1e6, "processor s": round(spent, 1)}
    kept = result.report_data()["rounding"]["notes"]
    row |= {"rejected": "; ".join(note for note in kept if "rejected" in note) or None}
    return row | {"channels": notes[0].partition(". Planned")[0] if notes else None}


def timed(contestants: list[Contestant]) -> dict[Contestant, float]:
    """Return the median milliseconds of one image, all contestants in turn."""
    image = NETWORKS["resnet20"].calibration(1)
    runs = {str(i): partial(executable(file_of(each), 1), (image,)) for i, each in enumerate(contestants)}
    timings = interleaved(runs, ROUNDS)
    return {each: 1000 * timings[str(i)].median for i, each in enumerate(contestants)}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parts = asked(__doc__, "part", ("expand", "prune"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    judge, rows = Judge.of(), list[Row]()
    known: dict[Contestant, Row] = {}
    for contestant in CONTESTANTS:
        kept = file_of(contestant).with_suffix(".json")
        if not kept.is_file() and contestant.part in parts:
            write_json(kept, "row", 1, {"row": measured(contestant, judge)})
        if kept.is_file():
            known[contestant] = read_json(kept, "row", 1)["row"]
            print(known[contestant], flush=True)
    times = timed(list(known))
    rows = [{**row, "ms": times[contestant]} for contestant, row in known.items()]
    right = float((judge.reference.argmax(dim=1) == judge.labels).double().mean())
    first: Row = {"part": "float", "network": "float", "accuracy %": 100 * right}
    meta = {"network": "resnet20", "calibration images": IMAGES, "evaluation images": EVALUATED, "seed": 0}
    _ = write("new_channels", [first, *rows], {**meta, "threads": 1})


if __name__ == "__main__":
    main()
