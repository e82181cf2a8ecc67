"""Answers of many plans to many images, kept so that `benchmarks.verdict` can compare judges without running a network.

For each network: weights rounded at every width by GPTQ on the tuning images, plans of several estimators around three
budgets with swaps around them and uniform ones, every plan run once in ONNX Runtime over all images. Everything is kept
in `build/verdict/<network>/`, so that a killed run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.zoo import NETWORKS
from fxquant import flow
from fxquant.api import capture, prepare
from fxquant.backends.onnx import executable, to_onnx
from fxquant.core.facts import (
    BitAllocation,
    Budget,
    CostTables,
    Finalists,
    Settings,
    Surrogates,
    WeightGrids,
    fits,
    limit_rows,
    tie_rows,
)
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import CalibrationSet, mixed, model_outputs, moved
from fxquant.core.storage import read_arrays, read_json, write_arrays, write_json
from fxquant.passes import AllocateBits, simulate
from fxquant.passes.allocation import one_hot, swaps
from fxquant.passes.rounding.closed_form import RoundWeights

FOLDER = Path(__file__).resolve().parent.parent / "build" / "verdict"
SEEDS = 5
BATCH = 32
WIDTHS = (2, 3, 4, 6, 8)
ESTIMATORS = ("gram", "diagonal", "fisher", "fit", "fisher_out", "weight_mse", "sqnr")
CHEAPER = ("diagonal", "fisher_out", "fit", "weight_mse", "sqnr")
"""Estimators for networks that take long."""
SWAPPED = 4
"""The plans of the first estimators are improved by swaps."""
SHORTER = 0.96
"""A second, slightly smaller budget that plans are solved for, so that plans differ in more than swaps."""

Answers = NDArray[np.float32]
Plan = dict[str, Choice]


@dataclass(frozen=True)
class Case:
    """What is measured on one network.

    Args:
        tuning: images that weights are rounded and plans scored on; also the seen part of the judging images.
        block: held-out images of each calibration seed.
        scoring: of the tuning images, those that estimators see.
        test: labelled images.
        budgets: average weight bits.
        plans: at each budget.
        kinds: of images.
        estimators: whose plans are measured.
        crossed: also round on each half of the tuning images alone and judge on the other half.
    """

    tuning: int
    block: int
    scoring: int
    test: int
    budgets: tuple[float, float, float]
    plans: int
    kinds: tuple[str, ...] = ("plain", "shifted", "mixed", "shifted, mixed")
    estimators: tuple[str, ...] = ESTIMATORS
    crossed: bool = False


FEWER = ("plain", "mixed", "shifted, mixed")
"""Kinds of images for networks that take long."""
CASES = {
    "resnet20": Case(256, 64, 64, 1017, (2.7, 3.2, 4.0), 40, crossed=True),
    "resnet32": Case(256, 64, 32, 1017, (2.7, 3.2, 4.0), 20),
    "mobilenet_v1": Case(96, 32, 32, 600, (4.0, 5.0, 6.0), 20, FEWER),
    "mobilenet_v2": Case(72, 24, 16, 300, (4.0, 5.0, 6.0), 12, FEWER, CHEAPER),
    "efficientnet_lite0": Case(48, 16, 8, 250, (4.0, 5.0, 6.0), 9, FEWER, CHEAPER),
    "deit_tiny": Case(48, 16, 12, 250, (3.0, 3.5, 4.5), 10, FEWER, CHEAPER),
}


KINDS: dict[str, tuple[Callable[[Tensor, int], Tensor], ...]] = {
    "plain": (),
    "shifted": (moved,),
    "mixed": (mixed,),
    "shifted, mixed": (moved, mixed),
}
"""Kind of judging images -> what is done to calibration images, one after the other."""


def changed(images: Tensor, kind: str, seed: int) -> Tensor:
    """Return images of a kind."""
    for change in KINDS[kind]:
        images = change(images, seed)
    return images


def parts(case: Case) -> list[slice]:
    """Return the parts of the calibration images that are only mixed among themselves: halves of tuning, blocks."""
    half = case.tuning // 2
    starts = (case.tuning + number * case.block for number in range(SEEDS))
    return [slice(0, half), slice(half, case.tuning), *(slice(start, start + case.block) for start in starts)]


def questions(name: str, case: Case) -> dict[str, Tensor]:
    """Return kind -> images, the kinds of calibration images in one order, and "test"."""
    images = NETWORKS[name].calibration(case.tuning + SEEDS * case.block)
    asked = {
        kind: torch.cat([changed(images[part], kind, number) for number, part in enumerate(parts(case))])
        for kind in case.kinds
    }
    return asked | {"test": NETWORKS[name].evaluation(case.test)[0]}


def calibrated(name: str, case: Case, images: CalibrationSet) -> Program:
    """Return the program with weights rounded at every width on these images, from the folder if they are there."""
    settings = Settings(bits=WIDTHS, estimators=case.estimators, time_limit=3.0)
    program = prepare(capture(NETWORKS[name].factory(), images), settings)
    return flow.calibrate(program, images.slice(0, case.tuning))


def with_bank(program: Program, images: CalibrationSet, path: Path) -> Program:
    """Return the program with its weights rounded on these images, kept in a file."""
    grids = program[WeightGrids]
    if not path.exists():
        rounded = flow.run(program, RoundWeights(images))
        rounded[WeightGrids].save_rounded(path)
    return program.with_facts(grids.with_rounded(path))


def neighbours(program: Program, plan: BitAllocation) -> Iterator[Plan]:
    """Yield plans one or two sites away within the plan's limits, in the order of the surrogates."""
    sites, tables = program[Sites], program[CostTables]
    matrices = list(program[Surrogates].matrices.values())
    (costs, bounds), (ties, sides) = limit_rows(plan.limits, tables, sites), tie_rows(sites)
    near = swaps(
        [matrix.values for matrix in matrices],
        matrices[0].groups,
        np.concatenate([costs, ties]),
        np.concatenate([bounds, sides]),
        one_hot(sites.candidates, plan.choices),
    )
    for chosen in near:
        yield {c.site: c.choice for c, taken in zip(sites.candidates, chosen, strict=True) if taken}


def good_plans(program: Program, bits: float, count: int) -> dict[str, Plan]:
    """Return name -> plan: of every estimator, uniform, and swaps around the former until there are `count`."""
    found: dict[str, Plan] = {}

    def add(name: str, plan: Plan) -> None:
        if len(found) < count and plan not in found.values() and fits(plan, {"average_bits": bits}, tables):
            found[name] = plan

    tables, bases = program[CostTables], list[BitAllocation]()
    bases_of = list(program[Surrogates].matrices)[:SWAPPED]
    for share in (1.0, SHORTER):
        plans = flow.run(program, AllocateBits(Budget(average_bits=bits * share), time_limit=3.0))[Finalists].plans
        for name, plan in plans.items():
            add(f"{name} at {bits * share:.3g}", plan.choices)
            if share == 1.0 and plan.estimator in bases_of:
                bases.append(replace(plan, limits={"average_bits": bits}))
    walks = [neighbours(program, plan) for plan in bases]
    for turn in range(count):
        for base, walk in zip(bases, walks, strict=True):
            for near in islice(walk, 1):
                add(f"{base.estimator}, swap {turn}", near)
    return found


def answers_of(program: Program, plan: Plan, asked: dict[str, Tensor]) -> dict[str, Answers]:
    """Return what the plan's file answers in ONNX Runtime, kind -> logits."""
    run = executable(to_onnx(simulate(program, BitAllocation(plan)).module).SerializeToString(), threads=1)
    return {kind: batched(run, images) for kind, images in asked.items()}


def batched(run: object, images: Tensor) -> Answers:
    """Return the answers to many images, batch by batch."""
    assert callable(run)
    parts = [run((images[start : start + BATCH],)) for start in range(0, len(images), BATCH)]
    answers: Answers = torch.cat(parts).numpy()
    return answers


def collect(name: str) -> None:
    """Measure what is missing of one network."""
    case, folder, started = CASES[name], FOLDER / name, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"{name}, {time.perf_counter() - started:.0f} s: {text}", flush=True)

    asked = questions(name, case)
    tuning = CalibrationSet((asked["plain"][: case.tuning],))
    program = with_bank(calibrated(name, case, tuning), tuning, folder / "bank.npz")
    say("rounded")
    if not (folder / "float.npz").exists():
        reference = {kind: model_outputs(program.module, (images,), BATCH).numpy() for kind, images in asked.items()}
        write_arrays(folder / "float.npz", reference | {"labels": NETWORKS[name].evaluation(case.test)[1].numpy()})
        say("float answers")
    if not (folder / "plans.json").exists():
        scored = flow.measure_sensitivity(program, tuning.slice(0, case.scoring), folder / "scores")
        say("scored")
        body = {}
        for bits in case.budgets:
            plans = good_plans(scored, bits, case.plans)
            models = scored[Surrogates].matrices
            body[f"{bits:g}"] = [
                {
                    "name": title,
                    "choices": {site: choice.label for site, choice in plan.items()},
                    "average bits": scored[CostTables]["average_bits"].of(plan),
                    "modelled": {key: matrix.predict(plan) for key, matrix in models.items()},
                }
                for title, plan in plans.items()
            ]
            say(f"{len(plans)} plans at {bits} bits")
        write_json(folder / "plans.json", "verdict plans", 1, {"budgets": body})
    budgets = read_json(folder / "plans.json", "verdict plans", 1)["budgets"]
    halves = parts(case)[:2]
    seen = [tuning.slice(half.start, half.stop) for half in halves] if case.crossed else []
    banks = [with_bank(program, images, folder / f"bank{k}.npz") for k, images in enumerate(seen)]
    # One plan of each budget in turn, so that what is there so far is of all of them.
    for number in range(case.plans):
        for bits, plans in budgets.items():
            path = folder / f"answers-{bits}-{number}.npz"
            if number >= min(len(plans), case.plans) or path.exists():
                continue
            plan = {site: Choice.parse(label) for site, label in plans[number]["choices"].items()}
            answers = answers_of(program, plan, asked)
            if banks:
                # Weights rounded on one half answer the images of the other.
                for kind in ("plain", "mixed"):
                    other = [asked[kind][halves[1 - k]] for k in range(2)]
                    pairs = zip(banks, other, strict=True)
                    crossed = [answers_of(bank, plan, {"": images})[""] for bank, images in pairs]
                    answers[f"crossed, {kind}"] = np.concatenate(crossed[::-1])
            write_arrays(path, answers)
        if number % 4 == 0:
            say(f"{number + 1} plans of each budget run")


def answers_at(name: str, bits: str) -> dict[int, dict[str, Answers]]:
    """Return number of a plan -> its answers, those that have been measured."""
    paths = {n: FOLDER / name / f"answers-{bits}-{n}.npz" for n in range(CASES[name].plans)}
    return {n: read_arrays(path) for n, path in paths.items() if path.exists()}
