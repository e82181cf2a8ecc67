"""What do recipes that train bring over plain fine-tuning, at equal steps and equal bytes?

`python -m benchmarks.recipes_training [contestant ...]`: CIFAR-10 ResNet-20, activations at 8 bits, 200 steps of 32
moved training images in all, towards the float network's answers (KL, no labels), at averages of 3 and 2.5 bits. Plain
fine-tuning trains a plan that was found without training. Accuracy and KL are of the exported file in ONNX Runtime on
the 1017 test images. `fastestdet` is a detector with `aqd`, which is plain fine-tuning there, for all its batch norms
are folded: AP before and after, both in ONNX Runtime with weights at 4 bits and activations at 8, both in simulation
with all at 4. Finished rows, scores and states of training are kept in `build/recipes_training`, so that a run can go
on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxquant
from benchmarks import data
from benchmarks.arguments import asked
from benchmarks.recipes import Judge, Row
from benchmarks.report_table import write
from benchmarks.task import file_answers, torch_answers
from benchmarks.task_table import TASKS
from benchmarks.zoo import NETWORKS
from fxquant.core.facts import Rounding, Settings
from fxquant.core.storage import read_json, write_json
from fxquant.qat import TrainedValues
from fxquant.result import Result

FOLDER = Path("build/recipes_training")
NETWORK, DETECTOR = "resnet20", "fastestdet"
STEPS, BATCH = 200, 32
BUDGETS = (3.0, 2.5)
"""Average bits."""
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
CONTESTANTS: dict[str, dict[str, Any]] = {
    "plain": {"effort": "fast", "bits": WIDTHS, "training": "distill"},
    "limpq": {"recipe": "limpq", "activation_bits": (8,), "training": "distill"},
    "bsq": {"recipe": "bsq"},
    "dropbits": {"recipe": "dropbits"},
}
"""Contestant -> settings. "plain": widths of the fast preset, weights rounded by GPTQ before training."""
DETECTOR_STEPS, DETECTOR_BATCH, UNLABELLED, EVALUATED = 300, 4, 108, 109
"""Steps, images of a step, images trained on beside the 20 of COCO, and images evaluated on (all)."""
DETECTORS: dict[str, dict[str, Any]] = {
    "W4A8": {"bits": (4,), "activation_bits": (8,), "target": "onnxruntime"},
    "W4A4": {"bits": (4,), "activation_bits": (4,), "target": "reference"},
}


def classifier_row(name: str, bits: float, judge: Judge) -> Row:
    """Return the figures of one contestant at one budget, before and after training."""
    network = NETWORKS[NETWORK]
    images = network.preprocessing(data.cifar10("train")[0])
    given = {"seed": 0, "curve": 0, "training_options": {"steps": STEPS, "batch": BATCH}, **CONTESTANTS[name]}
    began = time.process_time()
    result = fxquant.quantize(
        network.factory(), images, fxquant.Budget(average_bits=bits), workdir=FOLDER / name, options=given
    )
    seconds = time.process_time() - began
    row: Row = {"contestant": name, "budget, bits": bits, "plan by": result.allocation.estimator}
    row |= judge.measured(result, FOLDER / f"{name}-{bits}.onnx")
    row |= {f"{key} before": value for key, value in judge.measured(untrained(result), FOLDER / "before.onnx").items()}
    row |= {"average bits": result.allocation.used["average_bits"], "processor s": round(seconds, 1)}
    widths = [choice.weight_bits for choice in result.allocation.choices.values()]
    return row | {"widths": " ".join(f"{width:g}" for width in widths), "rejected": rejected(result)}


def untrained(result: Result) -> Result:
    """Return a result with its plan, and the weights that it had before training."""
    return replace(result, program=result.program.without(Rounding).without(TrainedValues))


def rejected(result: Result) -> str:
    """Return the note of a training that was rejected because the held-out loss did not fall."""
    notes = result.report_data()["rounding"]["notes"]
    return "; ".join(note for note in notes if "rejected" in note)


def result_answers(result: Result, path: Path) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return the answers of a result: of its file where ONNX Runtime runs its widths, else of the simulation."""
    if result.program[Settings].target == "onnxruntime":
        _ = result.to_onnx(path)
        return file_answers(path)
    return torch_answers(result.simulated)


def detector_row(kind: str) -> Row:
    """Return the AP of the detector before and after training, next to the float one's."""
    task = TASKS[DETECTOR]
    # Nothing but pictures is needed; COCO's twenty come first, on which ranges are found.
    others = data.imagenet_calibration(UNLABELLED, 352).flip(1) / 255.0
    coco = task.calibration()
    assert isinstance(coco, Tensor)
    images = torch.cat([coco, others])
    options = {"steps": DETECTOR_STEPS, "batch": DETECTOR_BATCH}
    given = {"recipe": "aqd", "seed": 0, "training_options": options, "effort": "fast", **DETECTORS[kind]}
    began = time.process_time()
    result = fxquant.quantize(task.model(), images, "average_bits=8", workdir=FOLDER / f"aqd {kind}", options=given)
    row: Row = {"contestant": f"aqd {DETECTOR} {kind}", "processor s": round(time.process_time() - began, 1)}
    row |= task.evaluate(result_answers(result, FOLDER / "after.onnx"), EVALUATED)
    before = task.evaluate(result_answers(untrained(result), FOLDER / "before.onnx"), EVALUATED)
    row |= {f"{key} before": value for key, value in before.items()}
    whole = task.evaluate(torch_answers(task.model()), EVALUATED)
    row |= {f"{key} float": value for key, value in whole.items()}
    row |= {"average bits": result.allocation.used["average_bits"], "rejected": rejected(result)}
    return row | {"runs in": "ONNX Runtime" if given["target"] == "onnxruntime" else "simulation"}


def kept(name: str, make: Callable[[], Row] | None) -> Iterator[Row]:
    """Yield a finished row from its file, or make it; nothing where it is neither there nor to be made."""
    path = FOLDER / f"{name}.json"
    if not path.is_file() and make is not None:
        write_json(path, "training row", 1, {"row": make()})
    if path.is_file():
        yield read_json(path, "training row", 1)["row"]


def rows(names: Sequence[str]) -> Iterator[Row]:
    """Yield the row of each contestant that is named, and of others that are finished."""
    judge = Judge.of(NETWORK)
    yield {"contestant": "float", "accuracy %": judge.accuracy(judge.reference)}
    for bits in BUDGETS:
        for name in CONTESTANTS:
            make = partial(classifier_row, name, bits, judge) if name in names else None
            yield from kept(f"{name} {bits}", make)
    for kind in DETECTORS:
        yield from kept(f"{DETECTOR} {kind}", partial(detector_row, kind) if DETECTOR in names else None)


def main() -> None:
    """Measure, print the table, write the JSON again after each row."""
    names = asked(__doc__, "contestant", (*CONTESTANTS, DETECTOR))
    FOLDER.mkdir(parents=True, exist_ok=True)
    meta: dict[str, object] = {"steps": STEPS, "batch": BATCH, "seed": 0, "threads": torch.get_num_threads()}
    meta |= {"training images": len(data.cifar10("train")[0]), "detector steps": DETECTOR_STEPS}
    meta |= {"detector batch": DETECTOR_BATCH, "detector images": 20 + UNLABELLED, "AP images": EVALUATED}
    found: list[Row] = []
    for row in rows(names):
        found.append(row)
        _ = write("training_recipes", found, meta)


if __name__ == "__main__":
    main()
