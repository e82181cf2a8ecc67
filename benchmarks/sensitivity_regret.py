"""How far from the best plan there is does each estimator's plan lie, where all plans can be enumerated?

`python -m benchmarks.sensitivity_regret`: ResNet-8 on CIFAR-10, W{2,4,8} A8, both ends at 8 bits: every plan's KL is
measured on labelled images (6561 plans). For eight budgets and three calibration subsets each estimator's plan is
solved for and its regret taken: KL of the plan minus KL of the best plan within the budget. `model` is Spearman's rank
correlation between an estimator's modelled loss and the measured one, over all plans.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.sensitivity_quality import BASELINES, PAIRS, SINGLES, spread
from benchmarks.zoo import NETWORKS
from fxquant import flow
from fxquant.api import capture, prepare
from fxquant.core.facts import BitAllocation, Budget, CostTables, Finalists, Settings, Surrogates
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import LOSSES, CalibrationSet, Environment, GraphReplay, model_outputs
from fxquant.passes import AllocateBits, simulate, widest_plan
from fxquant.passes.sensitivity import Replacements

SUBSETS, SCORING, TRUTH, SEED = 3, 64, 96, 0
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
"""Budgets, as shares of the way from the cheapest plan to the dearest."""
ESTIMATORS = (*PAIRS, "hybrid", *SINGLES, *BASELINES)

Plan = tuple[str, ...]
Row = dict[str, str | float | None]


def calibrated(images: CalibrationSet) -> Program:
    """Return ResNet-8, calibrated."""
    settings = Settings(bits=(2, 4, 8), estimators=ESTIMATORS, pin_ends=True, seed=SEED)
    program = prepare(capture(NETWORKS["resnet8"].factory(), images), settings)
    return flow.calibrate(program, images)


def every_plan(program: Program, images: Tensor) -> dict[Plan, float]:
    """Return the KL of every plan, the prefix of the network shared by plans that begin alike."""
    simulated = simulate(program, widest_plan(program), round_biases=False)
    reference = model_outputs(program.module, (images,))
    quantizers, replay, sites = Replacements(simulated), GraphReplay(simulated.module), program[Sites].sites
    widest = quantizers.plan(widest_plan(program))
    position = {name: index for index, name in enumerate(replay.by_name)}
    order = sorted(sites, key=lambda site: position[site.nodes[0]])
    standing = {name: change for part in widest.values() for name, change in part.items()}
    _, base = replay.forward((images,), standing)

    def walk(depth: int, below: dict[str, Choice], environment: Environment) -> Iterator[tuple[Plan, float]]:
        if depth == len(order):
            answer = replay.answer(environment)
            yield tuple(below[site.name].label for site in sites), float(LOSSES["kl"](reference, answer, None).mean())
            return
        site = order[depth]
        for choice in site.choices:
            change = quantizers.weight(site.name, choice.weight)
            now = {**standing}
            for name, chosen in (below | {site.name: choice}).items():
                now.update(quantizers.weight(name, chosen.weight))
            _, deeper = replay.replay(environment, now, changed=change, keep=True)
            yield from walk(depth + 1, below | {site.name: choice}, deeper)

    with torch.no_grad():
        return dict(walk(0, {}, base))


def modelled(program: Program, estimator: str, plans: list[Plan]) -> NDArray[np.float64]:
    """Return an estimator's modelled loss of every plan."""
    matrix, names = program[Surrogates].matrices[estimator], [site.name for site in program[Sites].sites]
    return np.array([matrix.predict(dict(zip(names, map(Choice.parse, plan), strict=True))) for plan in plans])


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each value."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(np.float64)


def main() -> None:
    """Measure, print the table, write the JSON."""
    asked(__doc__)
    torch.set_num_threads(1)
    network = NETWORKS["resnet8"]
    images, labels = network.evaluation(TRUTH)
    regret: defaultdict[str, list[float]] = defaultdict(list)
    correlation: defaultdict[str, list[float]] = defaultdict(list)
    accuracy, count, seconds = 0.0, 0, 0.0
    for subset in range(SUBSETS):
        calibration = CalibrationSet((network.calibration(SCORING * (subset + 1))[SCORING * subset :],))
        program = calibrated(calibration)
        accuracy = 100 * float((model_outputs(program.module, (images,)).argmax(dim=1) == labels).double().mean())
        started = time.perf_counter()
        truth = every_plan(program, images)
        seconds += time.perf_counter() - started
        program = flow.measure_sensitivity(program, calibration)
        plans, names = list(truth), [site.name for site in program[Sites].sites]
        count, losses = len(plans), np.array(list(truth.values()))
        bits = program[CostTables]["average_bits"]
        used = np.array([bits.of(dict(zip(names, map(Choice.parse, plan), strict=True))) for plan in plans])
        for estimator in ESTIMATORS:
            found = np.corrcoef(ranks(modelled(program, estimator, plans)), ranks(losses))[0, 1]
            correlation[estimator].append(float(found))
        for share in SHARES:
            budget = Budget(average_bits=float(used.min() + share * (used.max() - used.min())))
            best = losses[used <= (budget.average_bits or 0) * (1 + 1e-9)].min()
            solved: dict[str, BitAllocation] = flow.run(program, AllocateBits(budget))[Finalists].plans
            for estimator in ESTIMATORS:
                choices = solved[estimator].choices
                regret[estimator].append(truth[tuple(choices[name].label for name in names)] - best)
        print(f"subset {subset} done", flush=True)
    rows: list[Row] = []
    for estimator in sorted(ESTIMATORS, key=lambda name: statistics.mean(regret[name])):
        each = regret[estimator]
        rows.append({"estimator": estimator, "mean regret": statistics.mean(each), "largest regret": max(each)})
        rows[-1] |= {"best plan found": f"{sum(r < 1e-9 for r in each)} of {len(each)}"}
        rows[-1] |= {"model": statistics.mean(correlation[estimator]), "model spread": spread(correlation[estimator])}
    meta = {"network": "resnet8", "float accuracy %": accuracy, "plans": count, "seed": SEED, "budget shares": SHARES}
    meta |= {"subsets": SUBSETS, "scoring images": SCORING, "truth images": TRUTH, "seconds to enumerate": seconds}
    write("sensitivity_regret", rows, meta)


if __name__ == "__main__":
    main()
