"""How good are the plans of every estimator, of the full engine and of uniform precision, at equal average bits?

`python -m benchmarks.sensitivity_quality [network[:subset] ...]`: every case is measured on several disjoint
calibration subsets and kept in `build/sensitivity_quality/<network>-<subset>.json`, so that a killed run goes on and
two can share the work; then all cases that are there make the table (mean and spread over the subsets). KL to the
float network and accuracy are of the simulated graph on labelled images that nothing was tuned on, one rounding for
all (nearest, scales of least squared error). `paper` is CLADO as published: pairs of cross-entropy, projected to be
positive semidefinite; calibration images carry no labels here, so the float network's own answers are used. `engine`
measures the plans of `ENGINE` and the uniform ones on held-out calibration images, improves the best by swaps and
scores it again around itself. In subset `noise` a fifth of the calibration images is noise.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from fxquant import flow
from fxquant.api import capture, prepare
from fxquant.core.facts import BitAllocation, Budget, Finalists, Settings, Surrogates
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import LOSSES, CalibrationSet, model_outputs
from fxquant.core.storage import read_json, write_json
from fxquant.flow import allocate as search
from fxquant.passes import AllocateBits, simulate

FOLDER = Path(__file__).resolve().parent.parent / "build" / "sensitivity_quality"
SEED = 0
NOISE = "noise"

BASELINES = ("hawq", "mpqco", "fit", "fisher_out", "path", "sqnr", "weight_mse")
SINGLES = ("gram", "diagonal", "fisher")
PAIRS = ("pairs", "shrunk", "monotone", "coverage")
ENGINE = ("shrunk", "monotone", "pairs", "hybrid", *SINGLES, "hawq", "fit", "fisher_out", "weight_mse")
"""Estimators whose plans the engine measures, those that were scored."""


@dataclass(frozen=True)
class Case:
    """What is measured on one network.

    Args:
        bits: candidate weight bits; activations have 8.
        budgets: average weight bits.
        subsets: names of calibration subsets.
        scoring: images that scores are taken on.
        held_out: images that verification measures on.
        evaluation: labelled images.
        estimators: what is scored.
        paper: whether cross-entropy pairs are scored too.
        pairs_on: subsets on which all pairs are run.
        rounds: times the engine scores a plan again around itself.
    """

    bits: tuple[int, ...]
    budgets: tuple[float, ...]
    subsets: tuple[str, ...]
    scoring: int
    held_out: int
    evaluation: int
    estimators: tuple[str, ...]
    paper: bool
    pairs_on: tuple[str, ...] = ()
    rounds: int = 1


CASES = {
    "resnet20": Case(
        (2, 4, 8),
        (2.5, 3.0, 3.5, 4.0, 5.0, 6.0),
        ("0", "1", "2", "3", "4", NOISE),
        64,
        64,
        512,
        (*PAIRS, "hybrid", *SINGLES, *BASELINES),
        True,
        ("0", "1", "2", "3", "4"),
        2,
    ),
    "mobilenet_v1": Case(
        (3, 4, 5, 6, 7, 8),
        (5.0, 5.5, 6.0, 6.5, 7.0),
        ("0",),
        16,
        48,
        650,
        (*PAIRS, "hybrid", *SINGLES, *BASELINES),
        False,
    ),
    "mobilenet_v2": Case((4, 6, 8), (5.0, 5.5, 6.0), ("0",), 24, 32, 400, ("hybrid", *SINGLES, *BASELINES), False),
    "deit_tiny": Case(
        (3, 4, 8),
        (4.0, 4.5, 5.0),
        ("0",),
        16,
        32,
        128,
        (*SINGLES, "fit", "fisher_out", "weight_mse", "mpqco", "sqnr"),
        False,
    ),
}
"""All pairs of the larger networks would take from half an hour to days on this machine: see `sensitivity_cost`."""

Row = dict[str, str | float | None]


class Evaluation:
    """Measures plans on labelled images, each plan once."""

    def __init__(self, program: Program, images: Tensor, labels: Tensor) -> None:
        self.program, self.images, self.labels = program, images, labels
        self.reference = model_outputs(program.module, (images,), 32)
        self._known: dict[tuple[str, ...], tuple[float, float]] = {}

    @property
    def float_accuracy(self) -> float:
        """Accuracy of the float network in percent."""
        return 100 * float((self.reference.argmax(dim=1) == self.labels).double().mean())

    def __call__(self, plan: BitAllocation) -> tuple[float, float]:
        """Return KL in nats and accuracy in percent."""
        key = tuple(choice.label for choice in plan.choices.values())
        if key not in self._known:
            answer = model_outputs(simulate(self.program, plan).module, (self.images,), 32)
            right = (answer.argmax(dim=1) == self.labels).double().mean()
            self._known[key] = float(LOSSES["kl"](self.reference, answer, None).mean()), 100 * float(right)
        return self._known[key]


def calibration_images(name: str, subset: str, case: Case) -> Tensor:
    """Return the images of a subset; those of `noise` are subset 0's, every fifth replaced."""
    count, number = case.scoring + case.held_out, 0 if subset == NOISE else int(subset)
    images = NETWORKS[name].calibration(count * (number + 1))[count * number :].clone()
    if subset == NOISE:
        generator = torch.Generator().manual_seed(SEED)
        images[::5] = torch.randn(images[::5].shape, generator=generator) * images.std() + images.mean()
    return images


def scored(program: Program, case: Case, scoring: CalibrationSet, folder: Path) -> tuple[Program, dict[str, float]]:
    """Return the program with every estimator's matrix, and estimator -> passes per image."""
    program = flow.measure_sensitivity(program, scoring, folder)
    matrices = dict(program[Surrogates].matrices)
    if case.paper and "pairs" in matrices:
        answers = model_outputs(program.module, scoring.inputs).argmax(dim=1)
        labelled = CalibrationSet(scoring.inputs, answers)
        published = program.with_facts(replace(program[Settings], loss="ce", estimators=("pairs",)))
        published = flow.measure_sensitivity(published, labelled, folder / "paper")
        matrices["paper"] = published[Surrogates].matrices["pairs"]
    passes = {name: matrix.evaluations / len(scoring) for name, matrix in matrices.items()}
    return program.with_facts(Surrogates(matrices)), passes


def measure(name: str, subset: str) -> None:
    """Measure one subset of one network and keep its rows."""
    case, network, started = CASES[name], NETWORKS[name], time.perf_counter()
    calibration = CalibrationSet((calibration_images(name, subset, case),))
    scoring, held_out = calibration.split(case.held_out / len(calibration), SEED)
    estimators = tuple(name for name in case.estimators if name not in PAIRS or subset in case.pairs_on)
    settings = Settings(bits=case.bits, estimators=estimators, time_limit=5.0, seed=SEED, rounds=case.rounds)
    program = prepare(capture(network.factory(), calibration), settings)
    program, passes = scored(flow.calibrate(program, scoring), case, scoring, FOLDER / f"{name}-{subset}")
    evaluate = Evaluation(program, *network.evaluation(case.evaluation))
    rows: list[Row] = []

    def add(plan: str, budget: float, found: BitAllocation, estimator: str | None = None) -> None:
        loss, accuracy = evaluate(found)
        rows.append({"plan": plan, "average bits": budget, "KL": loss, "accuracy %": accuracy})
        rows[-1] |= {"passes": passes.get(plan), "chosen": estimator, "status": found.status}

    for bits in sorted({b for b in case.bits if b in (4, 8)} | {b for b in case.bits if b in case.budgets}):
        uniform = BitAllocation({site.name: Choice(bits, 8) for site in program[Sites].sites})
        add(f"uniform {bits}", float(bits), uniform)
    ours = {key: matrix for key, matrix in program[Surrogates].matrices.items() if key in ENGINE}
    for average in case.budgets:
        budget = Budget(average_bits=average)
        plans = flow.run(program, AllocateBits(budget, time_limit=5.0, seed=SEED))[Finalists].plans
        for estimator in program[Surrogates].matrices:
            add(estimator, average, plans[estimator])
        engine = search.allocate(program.with_facts(Surrogates(ours)), budget, held_out, scoring=scoring)
        add("engine", average, engine[BitAllocation], engine[BitAllocation].estimator)
        print(f"{name} {subset}: {average} bits after {time.perf_counter() - started:.0f} s", flush=True)
    body = {"network": name, "subset": subset, "float accuracy %": evaluate.float_accuracy, "rows": rows}
    write_json(FOLDER / f"{name}-{subset}.json", "benchmark part", 1, body | {"seconds": time.perf_counter() - started})


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation, 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(name: str, case: Case, noise: bool) -> tuple[list[Row], float | None]:
    """Return a network's rows over its subsets, or those of its noisy subset, and its float accuracy."""
    found: defaultdict[tuple[float, str], list[Row]] = defaultdict(list)
    accuracy = None
    for subset in case.subsets:
        path = FOLDER / f"{name}-{subset}.json"
        if (subset == NOISE) != noise or not path.exists():
            continue
        part = read_json(path, "benchmark part", 1)
        accuracy = part["float accuracy %"]
        for row in part["rows"]:
            found[row["average bits"], row["plan"]].append(row)
    rows: list[Row] = []
    for (average, plan), each in found.items():
        losses, right = ([float(row[key] or 0.0) for row in each] for key in ("KL", "accuracy %"))
        rows.append({"network": f"{name} (noise)" if noise else name, "average bits": average, "plan": plan})
        rows[-1] |= {"KL": statistics.mean(losses), "KL spread": spread(losses)}
        rows[-1] |= {"accuracy %": statistics.mean(right), "accuracy spread": spread(right)}
        chosen = "; ".join(str(row["chosen"]) for row in each) if plan == "engine" else None
        rows[-1] |= {"passes": each[0]["passes"], "subsets": float(len(each)), "chosen": chosen}
    return sorted(rows, key=lambda row: (float(row["average bits"] or 0), float(row["KL"] or 0))), accuracy


def main() -> None:
    """Measure what is missing, print the table, write the JSON."""
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for wanted in asked(__doc__, "network[:subset]", CASES):
        name, _, only = wanted.partition(":")
        for subset in (only,) if only else CASES[name].subsets:
            if not (FOLDER / f"{name}-{subset}.json").exists():
                measure(name, subset)
    rows: list[Row] = []
    accuracy: dict[str, float | None] = {}
    for name, case in CASES.items():
        for noise in (False, True):
            more, seen = table(name, case, noise)
            rows += more
            accuracy |= {name: seen} if seen is not None else {}
    cases = {
        name: {"bits": case.bits, "scoring": case.scoring, "held out": case.held_out, "test": case.evaluation}
        for name, case in CASES.items()
    }
    write("sensitivity_quality", rows, {"seed": SEED, "cases": cases, "float accuracy %": accuracy, "engine": ENGINE})


if __name__ == "__main__":
    main()
