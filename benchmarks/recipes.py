"""How do published methods compare on one engine, with the same images, widths, bytes and rounding?

`python -m benchmarks.recipes [network ...] [recipe ...]`: recipes of `fxquant.recipes` at two budgets, next to our
default. All have the same candidate widths and no pinned layers, so that equal bits on average are equal bytes; each is
measured with its own rounding and, where that is no part of the method, with GPTQ. Accuracy and KL are of the exported
file in ONNX Runtime, on images that nothing was tuned on. Finished recipes are kept in `build/recipes`, so that a run
can go on; rows of other recipes stay in the JSON. `python -m benchmarks.recipes_page` writes `docs/recipes.md` from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import fxquant
from benchmarks import data
from benchmarks.arguments import asked
from benchmarks.report_table import RESULTS, write
from benchmarks.zoo import NETWORKS
from fxquant.backends.onnx import executable
from fxquant.core.errors import FileFormatError
from fxquant.core.facts import Budget, Settings
from fxquant.core.run import LOSSES
from fxquant.core.storage import read_json, write_json
from fxquant.recipes import RECIPES
from fxquant.result import Result

FOLDER = Path("build/recipes")
BITS = (2, 3, 4, 8)
"""Candidate widths of every contestant but the last."""
BUDGETS = (3.0, 4.0)
"""Average bits."""
ITERATIONS = 100
"""Steps for each unit of all roundings that are learned; fewer than the papers', alike for all."""
COMMON = {"pin_ends": False, "curve": 0, "seed": 0}
OWN, GPTQ = "own", "gptq"
OTHERS: dict[str, dict[str, object]] = {
    "default": {"bits": BITS},
    "default, its own widths": {},
    "hawq-v3, loss kl": {"bits": BITS, "recipe": "hawq-v3", "loss": "kl"},
    "mpqco, loss kl": {"bits": BITS, "recipe": "mpqco", "loss": "kl"},
    "zeroq, scored by GPTQ": {"bits": BITS, "recipe": "zeroq", "scoring_rounding": GPTQ, "rounding": GPTQ},
    "modelopt, scored by GPTQ": {"bits": BITS, "recipe": "modelopt", "scoring_rounding": GPTQ, "rounding": GPTQ},
}
"""Contestants that are no rows of `RECIPES` as they are -> their settings."""
LEFT_OUT = ("hawq-v2", "daq", "limpq", "rmsmp", "expand", "prune", "dynamic", "kl-lm", "hessian-lm")
"""With widths and ends like all others, HAWQ-v2 is HAWQ-v3; DAQ and LIMPQ have activations below 8 bits, which ONNX
Runtime does not run; RMSMP has other formats, of 4 bits and more; `benchmarks.new_channels` has `expand` and `prune`,
`benchmarks.routed` has `dynamic`, and `benchmarks.recipes_language` the others."""

CONTESTANTS = (*OTHERS, *(name for name in RECIPES if name not in LEFT_OUT))

Row = dict[str, str | float | None]


@dataclass(frozen=True)
class Case:
    """A network of the benchmark.

    Args:
        calibration: how many calibration images every recipe gets.
        evaluation: how many images are evaluated on.
        labels: count -> labels of the calibration images.
    """

    calibration: int
    evaluation: int
    labels: Callable[[int], Tensor]


CASES = {"resnet20": Case(128, 1017, data.cifar10_calibration_labels)}


@dataclass(frozen=True)
class Judge:
    """Measures results of one network on images that nothing was tuned on."""

    images: Tensor
    labels: Tensor
    reference: Tensor

    @staticmethod
    def of(name: str) -> Judge:
        """Return the judge of a network."""
        network = NETWORKS[name]
        images, labels = network.evaluation(CASES[name].evaluation)
        model = network.factory()
        with torch.inference_mode():
            answers = [model(part) for part in torch.split(images, 64)]
        return Judge(images, labels, torch.cat(answers))

    def accuracy(self, answers: Tensor) -> float:
        """Return top-1 accuracy in per cent."""
        return 100 * float((answers.argmax(dim=1) == self.labels).double().mean())

    def measured(self, result: Result, path: Path) -> Row:
        """Return bytes, accuracy and KL of a result's ONNX file."""
        size = result.to_onnx(path).bytes
        run = executable(path.read_bytes(), torch.get_num_threads())
        answers = torch.cat([run((part,)) for part in torch.split(self.images, 64)])
        kl = float(LOSSES["kl"](self.reference, answers, None).mean())
        return {"bytes": size, "accuracy %": self.accuracy(answers), "KL": kl}


Work = tuple[str, tuple[str, ...]]
"""A contestant and the roundings that it is measured with in one go."""


def work(names: Iterable[str]) -> list[Work]:
    """Return what is to be measured, roundings that are learned, and take most of the time, last."""
    quick, slow = list[Work](), list[Work]()
    for name in names:
        learns = name in RECIPES and bool(RECIPES[name].learned)
        fixed = name in RECIPES and "rounding" in RECIPES[name].essence
        other = () if fixed or OTHERS.get(name, {}).get("rounding") == GPTQ else (GPTQ,)
        if learns:
            slow.append((name, (OWN,)))
        quick += [(name, other if learns else (OWN, *other))] if other or not learns else []
    return quick + slow


def solutions(scored: Result, rounding: str) -> Iterator[tuple[float, str, Result, float]]:
    """Yield (average bits, rounding, result, processor seconds) of a scored result for each budget.

    Args:
        scored: of `quantize` without a budget.
        rounding: `OWN`, or the name of one that replaces it.
    """
    program = scored.program
    if rounding != OWN:
        program = program.with_facts(replace(program[Settings], rounding=rounding, rounding_options={}))
    for bits in BUDGETS:
        began = time.process_time()
        solved = fxquant.resolve(replace(scored, program=program), Budget(average_bits=bits), progress=False)
        yield bits, program[Settings].rounding or "", solved, time.process_time() - began


def rows_of(network: str, item: Work, judge: Judge, folder: Path) -> Iterator[Row]:
    """Yield the rows of one contestant: scored once, then solved and rounded for each budget."""
    name, roundings = item
    case, settings = CASES[network], {"bits": BITS, "recipe": name} if name in RECIPES else OTHERS[name]
    calibration = [(NETWORKS[network].calibration(case.calibration), case.labels(case.calibration))]
    learned = {"rounding_options": {"iterations": ITERATIONS}}
    began = time.process_time()
    options = {**COMMON, **learned, **settings}
    model, place = NETWORKS[network].factory(), folder / "scores" / name
    scored = fxquant.quantize(model, calibration, None, workdir=place, progress=False, options=options)
    spent = time.process_time() - began
    for rounding in roundings:
        for bits, chain, solved, seconds in solutions(scored, rounding):
            row: Row = {"network": network, "recipe": name, "budget, bits": bits, "rounding": chain, "which": rounding}
            row |= judge.measured(solved, folder / f"{name}-{rounding}-{bits}.onnx")
            row |= {"average bits": solved.allocation.used["average_bits"], "processor s": round(spent + seconds, 1)}
            yield row | {"passes": scored.sensitivity.evaluations, "rejected": rejected(solved)}


def rejected(result: Result) -> str:
    """Return the note of a rounding that was rejected because the held-out loss did not fall."""
    notes = result.report_data()["rounding"]["notes"]
    return "; ".join(note for note in notes if "rejected" in note)


def measure(network: str, names: Iterable[str]) -> None:
    """Write the JSON of one network again after each contestant; rows of those not named stay as they are."""
    case, folder, judge = CASES[network], FOLDER / network, Judge.of(network)
    folder.mkdir(parents=True, exist_ok=True)
    first: Row = {"network": network, "recipe": "float", "accuracy %": judge.accuracy(judge.reference)}
    meta: dict[str, object] = {"calibration images": case.calibration, "evaluation images": case.evaluation}
    meta |= {"widths": BITS, "iterations": ITERATIONS, "seed": 0, "threads": torch.get_num_threads()}
    for item in work(names):
        name, roundings = item
        path = folder / f"{name} {' '.join(roundings)}.json"
        if not path.is_file():
            write_json(path, "recipe rows", 1, {"rows": list(rows_of(network, item, judge, folder))})
        rows = read_json(path, "recipe rows", 1)["rows"]
        write(f"recipes_{network}", [first, *merged(network, rows)], meta)


def merged(network: str, rows: list[Row]) -> list[Row]:
    """Return the rows of a network's JSON with these in the place of older ones, in the order of the recipes."""
    found: list[Row] = []
    with suppress(FileFormatError):
        found = read_json(RESULTS / f"recipes_{network}.json", "benchmark", 1)["rows"][1:]
    unique = {(row["recipe"], row["which"], row["budget, bits"]): row for row in (*found, *rows)}
    return sorted(unique.values(), key=lambda row: (CONTESTANTS.index(str(row["recipe"])), row["which"] != OWN))


def main() -> None:
    """Measure, print the tables, write the JSON of each network."""
    given = asked(__doc__, "network or recipe", CASES)
    names = [name for name in given if name not in CASES] or CONTESTANTS
    for network in [name for name in given if name in CASES] or CASES:
        measure(network, names)


if __name__ == "__main__":
    main()
