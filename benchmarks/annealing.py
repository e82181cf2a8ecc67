"""How far is the engine's plan from what long annealing under the engine's own criterion finds?

`python -m benchmarks.annealing`: ResNet-20 at 3.5 bits on average, weights of the bank. The engine's plan, and the best
of 600 steps of annealing that start at the best uniform plan and measure every proposal as the engine does (all
calibration images, mixed in pairs). Both plans are compared by that loss, and by the KL on images that neither saw. The
share of the budget that each spends is shown, since a plan that leaves bits over could be better.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor

import fxquant
from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from fxquant import flow
from fxquant.core.facts import BitAllocation, CostTables, Settings, agrees, fits, usage
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import LOSSES, model_outputs
from fxquant.passes import Meter, simulate, uniform_plans

NETWORK, IMAGES, TESTS, BITS = "resnet20", 256, 1017, 3.5
STEPS, SEEDS = 600, (0, 1)
HOTTEST, COLDEST = 0.2, 0.005
"""Temperatures at the start and the end, as shares of the first plan's loss."""

Row = dict[str, str | float | None]


def proposal(
    program: Program, now: dict[str, Choice], limits: dict[str, float], draw: np.random.Generator
) -> dict[str, Choice]:
    """Return a plan that keeps the limits and differs from this one at one to three sites."""
    sites, tables = program[Sites], program[CostTables]
    while True:
        trial = dict(now)
        for position in draw.choice(len(sites.sites), size=draw.integers(1, 4), replace=False):
            site = sites.sites[position]
            trial[site.name] = site.choices[draw.integers(len(site.choices))]
        if trial != now and fits(trial, limits, tables) and agrees(sites.sites, trial):
            return trial


def annealed(program: Program, meter: Meter, limits: dict[str, float], seed: int) -> dict[str, Choice]:
    """Return the best plan of the annealing."""
    draw = np.random.default_rng(seed)
    fitting = [plan for plan in uniform_plans(program[Sites].sites).values() if fits(plan, limits, program[CostTables])]
    losses = [float(meter.losses(BitAllocation(plan)).mean()) for plan in fitting]
    loss = first = min(losses)
    best = now = fitting[losses.index(loss)]
    least = loss
    for step in range(STEPS):
        trial = proposal(program, now, limits, draw)
        then = float(meter.losses(BitAllocation(trial)).mean())
        heat = first * HOTTEST * (COLDEST / HOTTEST) ** (step / STEPS)
        if then < loss or draw.random() < math.exp((loss - then) / heat):
            now, loss = trial, then
        if then < least:
            best, least = trial, then
    return best


def figures(program: Program, meter: Meter, answers: tuple[Tensor, Tensor], choices: dict[str, Choice]) -> Row:
    """Return what a plan loses and spends.

    Args:
        program: calibrated, with the engine's plan.
        meter: of the engine's criterion.
        answers: test images and the float network's answers to them.
        choices: of the plan.
    """
    images, reference = answers
    chosen, limits = BitAllocation(choices), program[BitAllocation].limits
    answer = model_outputs(simulate(program, chosen).module, (images,))
    found: Row = {"loss": float(meter.losses(chosen).mean())}
    found["KL on test images"] = float(LOSSES["kl"](reference, answer, None).mean())
    return found | {"bits": usage(choices, limits, program[CostTables])["average_bits"]}


def main() -> None:
    """Measure, print the table, write the JSON."""
    _ = asked(__doc__)
    torch.set_num_threads(1)
    network, rows = NETWORKS[NETWORK], list[Row]()
    images, _labels = network.evaluation(TESTS)
    for seed in SEEDS:
        started = time.process_time()
        result = fxquant.quantize(
            network.factory(),
            network.calibration(IMAGES),
            fxquant.Budget(average_bits=BITS),
            rounding="nearest",
            progress=False,
            options=Settings(seed=seed, curve=0),
        )
        seconds = time.process_time() - started
        program, plan = result.program, result.program[BitAllocation]
        judged = flow.judged_on(program, result.scoring, result.held_out)
        assert judged is not None
        meter = Meter(program, judged, flow.loss_in_use(program, judged))
        answers = images, model_outputs(program.module, (images,))
        engine: Row = {"seed": float(seed), "plan": "engine"}
        rows.append(engine | figures(program, meter, answers, plan.choices) | {"processor s": round(seconds, 1)})
        started = time.process_time()
        best = annealed(program, meter, dict(plan.limits), seed)
        seconds = time.process_time() - started
        other: Row = {"seed": float(seed), "plan": f"{STEPS} steps of annealing"}
        rows.append(other | figures(program, meter, answers, best) | {"processor s": round(seconds, 1)})
    write("annealing", rows, {"network": NETWORK, "average bits": BITS, "images": IMAGES, "test images": TESTS})


if __name__ == "__main__":
    main()
