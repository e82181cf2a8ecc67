"""How do published methods compare on one engine, with the same images, widths, bytes and rounding?

`python -m benchmarks.recipes [network ...] [recipe ...]`: recipes of `fxquant.recipes` at two budgets, next to our
default. All have the same candidate widths and no pinned layers, so that equal bits on average are equal bytes; each is
measured with its own rounding and, where that is no part of the method, with GPTQ. Accuracy and KL are of the exported
file in ONNX Runtime, on images that nothing was tuned on. Finished recipes are kept in `build/recipes`, so that a run
can go on; rows of other recipes stay in the JSON. `python -m benchmarks.recipes_page` writes `docs/recipes.md` from it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
from fxquant.core.facts import EFFORTS, Budget, Settings
from fxquant.core.run import LOSSES
from fxquant.core.storage import read_arrays, read_json, write_arrays, write_json
from fxquant.recipes import RECIPES, settings_of
from fxquant.result import Result

FOLDER = Path("build/recipes")
BITS = (2, 3, 4, 8)
"""Candidate widths of every contestant but the last."""
BUDGETS = (3.0, 4.0)
"""Average bits."""
LEARNING = {"iterations": 100}
"""Options of all roundings that are learned: steps for each unit, fewer than the papers'."""
COMMON = {"pin_ends": False, "curve": 0, "seed": 0}
OWN, NEAREST, GPTQ = "own", "nearest", "gptq"
OTHERS: dict[str, dict[str, object]] = {
    "default": {"bits": BITS},
    "default, its own widths": {},
    "hawq-v3, loss kl": {"bits": BITS, "recipe": "hawq-v3", "loss": "kl"},
    "mpqco, loss kl": {"bits": BITS, "recipe": "mpqco", "loss": "kl"},
    "zeroq, scored by GPTQ": {"bits": BITS, "recipe": "zeroq", "scoring_rounding": GPTQ, "rounding": GPTQ},
    "modelopt, scored by GPTQ": {"bits": BITS, "recipe": "modelopt", "scoring_rounding": GPTQ, "rounding": GPTQ},
    "limpq, activations at 8 bits": {"bits": BITS, "recipe": "limpq", "activation_bits": (8,)},
    "daq, activations at 8 bits": {"bits": BITS, "recipe": "daq", "activation_bits": (8,)},
    "rmsmp, at 4.1 bits": {"recipe": "rmsmp"},
}
"""Contestants that are no rows of `RECIPES` as they are -> their settings."""
BUDGETS_OF = {"rmsmp, at 4.1 bits": (4.1,)}
"""Contestant -> budgets, where they are not those of all: formats of RMSMP have 4 bits, and levels of each row."""
LEFT_OUT = ("hawq-v2", "daq", "limpq", "rmsmp", "expand", "prune", "dynamic", "kl-lm", "hessian-lm")
"""With widths and ends like all others, HAWQ-v2 is HAWQ-v3; DAQ and LIMPQ have activations below 8 bits, which ONNX
Runtime does not run, and RMSMP formats of more than 4 bits (see above); `benchmarks.new_channels` has `expand` and
`prune`, `benchmarks.routed` has `dynamic`, and `benchmarks.recipes_language` the others.
`benchmarks.recipes_training` has those that train."""

OURS = ("default", OWN)
"""What all others are compared with, and its rounding."""

CONTESTANTS = (*OTHERS, *(name for name, each in RECIPES.items() if name not in LEFT_OUT and not each.training))

Row = dict[str, str | float | None]


@dataclass(frozen=True)
class Case:
    """A network of the benchmark.

    Args:
        calibration: how many calibration images every recipe gets.
        evaluation: how many images are evaluated on.
        labels: count -> labels of the calibration images.
        fewer: contestant -> how many calibration images it gets where it cannot take all in reasonable time.
        learning: options of all roundings that are learned, alike for all contestants.
    """

    calibration: int
    evaluation: int
    labels: Callable[[int], Tensor]
    fewer: Mapping[str, int] = field(default_factory=dict)
    learning: Mapping[str, int] = field(default_factory=lambda: LEARNING)


SHORT = {"iterations": 60, "batch": 8}
"""Options of learned roundings on networks for images of 224 x 224 pixels."""
CASES = {
    "resnet20": Case(128, 1017, data.cifar10_calibration_labels),
    "mobilenet_v2": Case(64, 200, data.imagenet_calibration_labels, {"clado": 4, "clado-kl": 4}, SHORT),
    "deit_tiny": Case(32, 100, data.imagenet_calibration_labels, {}, SHORT),
}


@dataclass(frozen=True)
class Judge:
    """Measures results of one network on images that nothing was tuned on.

    Args:
        images, labels: to evaluate on.
        reference: answers of the float network.
        known: digest of a file -> its answers, so that plans which several recipes find are run once.
    """

    images: Tensor
    labels: Tensor
    reference: Tensor
    known: dict[str, Tensor] = field(default_factory=dict)

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
        """Return bytes, accuracy and KL of a result's ONNX file, and write the KL of each image beside it."""
        size, file = result.to_onnx(path).bytes, path.read_bytes()
        digest = hashlib.sha256(file).hexdigest()
        if digest not in self.known:
            run = executable(file, torch.get_num_threads())
            self.known[digest] = torch.cat([run((part,)) for part in torch.split(self.images, 64)])
        answers = self.known[digest]
        kl = LOSSES["kl"](self.reference, answers, None).double()
        write_arrays(path.with_suffix(".npz"), {"kl": kl.numpy()})
        return {"bytes": size, "accuracy %": self.accuracy(answers), "KL": float(kl.mean()), "KL s.e.": error_of(kl)}


def error_of(values: Tensor) -> float:
    """Return the standard error of the mean of values `(N,)`."""
    return float(values.std() / len(values) ** 0.5)


Work = tuple[str, tuple[str, ...], tuple[float, ...]]
"""A contestant, and the roundings and budgets that it is measured with in one go."""


def work(names: Iterable[str]) -> list[Work]:
    """Return what is to be measured: measured pairs and learned roundings, which take most of the time, last."""
    quick, slow = list[Work](), list[Work]()
    names = sorted(names, key=lambda name: name in RECIPES and "pairs" in RECIPES[name].estimator)
    for name in names:
        learns = name in RECIPES and bool(RECIPES[name].learned)
        fixed = name in RECIPES and "rounding" in RECIPES[name].essence
        other = () if fixed or OTHERS.get(name, {}).get("rounding") == GPTQ else (GPTQ,)
        if learns:
            slow += [(name, (OWN,), (bits,)) for bits in BUDGETS]
        if other or not learns:
            quick.append((name, (NEAREST, *other) if learns else (OWN, *other), BUDGETS_OF.get(name, BUDGETS)))
    # A run that is stopped has one budget of all learned roundings rather than two of some; that of the papers first.
    return quick + sorted(slow, key=lambda item: item[2], reverse=True)


class Bench:
    """One network with its calibration, which recipes of the same observer, widths and scoring rounding share."""

    def __init__(self, network: str, folder: Path) -> None:
        self.network, self.folder, self.case = network, folder, CASES[network]
        self.known: dict[tuple[object, ...], tuple[Result, float]] = {}

    def calibrated(self, settings: Settings) -> tuple[Result, float]:
        """Return a result calibrated but not scored, and what that took in processor seconds."""
        shared = {name: getattr(settings, name) for name in ("bits", "observer", "scoring_rounding")}
        key = tuple(shared.values())
        if key not in self.known:
            began, count = time.process_time(), self.case.calibration
            images = [(NETWORKS[self.network].calibration(count), self.case.labels(count))]
            # The one estimator that runs nothing.
            options = {**COMMON, "estimators": ("weight_mse",), **shared}
            result = fxquant.quantize(NETWORKS[self.network].factory(), images, None, progress=False, options=options)
            self.known[key] = (result, time.process_time() - began)
        return self.known[key]

    def scored(self, name: str) -> tuple[Result, float]:
        """Return the result of a contestant without a plan, and its processor seconds, calibration included."""
        own = {"bits": BITS, "recipe": name} if name in RECIPES else OTHERS[name]
        learned = {"rounding_options": dict(self.case.learning)}
        settings = settings_of({**COMMON, **learned, **own})
        result, spent = self.calibrated(settings)
        preset, before = EFFORTS[settings.effort], result.program[Settings]
        settings = settings.settled(bits=before.bits, estimators=preset.estimators, rounding=preset.rounding)
        began = time.process_time()
        program, images = result.program.with_facts(settings), result.scoring
        assert images is not None
        assert images.labels is not None
        images = images.slice(0, self.case.fewer.get(name, len(images)))
        batches = [(images.inputs[0], images.labels)]
        program = fxquant.measure_sensitivity(program, batches, self.folder / "scores" / name, progress=False)
        return replace(result, program=program), spent + time.process_time() - began

    def plainly_rounded(self, solved: Result) -> Result:
        """Return a result's plan with all weights at nearest, whatever they were scored with."""
        if solved.program[Settings].scoring_rounding == NEAREST:
            return solved
        settings = replace(solved.program[Settings], scoring_rounding="nearest")
        result, _ = self.calibrated(settings)
        return replace(result, program=result.program.with_facts(solved.allocation))


def solutions(
    scored: Result, rounding: str, budgets: Sequence[float] = BUDGETS
) -> Iterator[tuple[float, str, Result, float]]:
    """Yield (average bits, rounding, result, processor seconds) of a scored result for each budget.

    Args:
        scored: of `quantize` without a budget.
        rounding: `OWN`, or the name of one that replaces it.
        budgets: average bits.
    """
    program = scored.program
    if rounding != OWN:
        program = program.with_facts(replace(program[Settings], rounding=rounding, rounding_options={}))
    for bits in budgets:
        began = time.process_time()
        solved = fxquant.resolve(replace(scored, program=program), Budget(average_bits=bits), progress=False)
        solved = widest_uniform(solved) if program[Settings].rounding == NEAREST else solved
        yield bits, program[Settings].rounding or "", solved, time.process_time() - began


def widest_uniform(solved: Result) -> Result:
    """Return a result whose finalists are all uniform with the widest of them: plans are compared at equal bytes.

    Where all of them are ruined, chance decides which loses least, and it may be a narrower one.
    """
    plans = solved.finalists.values()
    if any(plan.status != "uniform" for plan in plans):
        return solved
    return replace(solved, program=solved.program.with_facts(max(plans, key=lambda plan: plan.used["average_bits"])))


def rows_of(bench: Bench, item: Work, judge: Judge) -> Iterator[Row]:
    """Yield the rows of one contestant: scored once, then solved and rounded for each budget."""
    name, roundings, budgets = item
    scored, spent = bench.scored(name)
    for rounding in roundings:
        for bits, chain, solved, seconds in solutions(scored, rounding, budgets):
            solved = bench.plainly_rounded(solved) if chain == NEAREST else solved
            row: Row = {"network": bench.network, "recipe": name, "budget, bits": float(round(bits)), "rounding": chain}
            row |= {"which": rounding, **judge.measured(solved, bench.folder / f"{name}-{rounding}-{bits}.onnx")}
            row |= {"average bits": solved.allocation.used["average_bits"], "processor s": round(spent + seconds, 1)}
            row |= {"passes": scored.sensitivity.evaluations, "rejected": rejected(solved)}
            yield row
            if rounding == OWN and chain != NEAREST and len(roundings) > 1:
                path = bench.folder / f"{name}-{NEAREST}-{bits}.onnx"
                plain = {"rounding": NEAREST, "which": NEAREST, "rejected": ""}
                yield row | plain | judge.measured(bench.plainly_rounded(solved), path)


def rejected(result: Result) -> str:
    """Return the note of a rounding that was rejected because the loss did not fall."""
    notes = result.report_data()["rounding"]["notes"]
    return "; ".join(note for note in notes if "rejected" in note)


def measure(network: str, names: Iterable[str]) -> None:
    """Write the JSON of one network again after each contestant; rows of those not named stay as they are."""
    case, folder = CASES[network], FOLDER / network
    folder.mkdir(parents=True, exist_ok=True)
    judge, bench = Judge.of(network), Bench(network, folder)
    first: Row = {"network": network, "recipe": "float", "accuracy %": judge.accuracy(judge.reference)}
    meta: dict[str, object] = {"calibration images": case.calibration, "evaluation images": case.evaluation}
    meta |= {"widths": BITS, "learning": dict(case.learning), "seed": 0, "threads": torch.get_num_threads()}
    meta |= {"fewer images": dict(case.fewer)}
    for item in work(names):
        name, roundings, budgets = item
        path = folder / f"{' '.join([name, *roundings, *map(str, budgets)])}.json"
        if not path.is_file():
            write_json(path, "recipe rows", 1, {"rows": list(rows_of(bench, item, judge))})
        rows = [row | against_default(row, folder) for row in read_json(path, "recipe rows", 1)["rows"]]
        write(f"recipes_{network}", [first, *merged(network, rows)], meta)


def against_default(row: Row, folder: Path) -> Row:
    """Return how far a row's KL is above our default's at the same budget, with the paired standard error."""
    names = [f"{recipe}-{which}-{row['budget, bits']}.npz" for recipe, which in ((row["recipe"], row["which"]), OURS)]
    if not all((folder / name).is_file() for name in names):
        return {}
    one, ours = (torch.from_numpy(read_arrays(folder / name)["kl"]) for name in names)
    return {"KL above default": float((one - ours).mean()), "its s.e.": error_of(one - ours)}


def above(row: Row, ours: Row) -> Row:
    """Return how far a row's KL is above our default's where the default was measured again since.

    The images are the same, so that the difference of means is still that of the pairs. Its standard error is not
    known any more: the root of the sum of squares is more than it.
    """
    known, theirs, own, one, other = (
        float(value) if isinstance(value, float | int) else math.nan
        for value in (row.get("KL above default"), row["KL"], ours["KL"], row["KL s.e."], ours["KL s.e."])
    )
    if math.isclose(known, theirs - own, abs_tol=1e-6):
        return {}
    return {"KL above default": theirs - own, "its s.e.": math.hypot(one, other)}


def merged(network: str, rows: list[Row]) -> list[Row]:
    """Return the rows of a network's JSON with these in the place of older ones, in the order of the recipes.

    Rows of another number of images are left out: they are not to be compared with.
    """
    found: list[Row] = []
    with suppress(FileFormatError):
        document, case = read_json(RESULTS / f"recipes_{network}.json", "benchmark", 1), CASES[network]
        counts = [document["meta"][f"{kind} images"] for kind in ("calibration", "evaluation")]
        found = document["rows"][1:] if counts == [case.calibration, case.evaluation] else []
    unique = {(row["recipe"], row["which"], row["budget, bits"]): row for row in (*found, *rows)}
    ours = {row["budget, bits"]: row for row in unique.values() if (row["recipe"], row["which"]) == OURS}
    again = [row | above(row, ours[row["budget, bits"]]) for row in unique.values() if row["budget, bits"] in ours]
    again += [row for row in unique.values() if row["budget, bits"] not in ours]
    return sorted(again, key=lambda row: (CONTESTANTS.index(str(row["recipe"])), row["which"] != OWN))


def main() -> None:
    """Measure, print the tables, write the JSON of each network."""
    given = asked(__doc__, "network or recipe", CASES)
    names = [name for name in given if name not in CASES] or CONTESTANTS
    for network in [name for name in given if name in CASES] or CASES:
        measure(network, names)


if __name__ == "__main__":
    main()
