"""Does the latency model predict what whole networks take, for plans that it was not fitted to?

`python -m benchmarks.latency_model [network ...] [target ...]`: each network is measured as a latency budget has it
measured (layers alone and sixteen mixed networks; seconds of the first run and of one that finds everything on disk are
given), then predictions are compared with held-out plans: three with stretches in float, three with layers in float
drawn one by one, and the integer program's plans at limits of `latency_ratio`. All plans of a network and the float
model are timed in turn, CPU time of one thread. The error is that of the ratio to float in the same run, because a
shared machine changes its pace between the fit and the check; how much it did is the column `pace %`. All integers and
all float are listed but not counted: the model was fitted to them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from fxquant import flow
from fxquant.api import capture, prepare
from fxquant.backends import BACKENDS, backend
from fxquant.core.errors import InfeasibleBudgetError
from fxquant.core.facts import BitAllocation, Budget, CostTables, Settings
from fxquant.core.host import TimingCache, time_runs
from fxquant.core.ir import FLOAT, Choice, Program, Sites
from fxquant.core.run import CalibrationSet
from fxquant.flow import measure_latency
from fxquant.passes import AllocateBits, mixed_plans, simulate, widest_plan

SEED, CHECK_SEED, ROUNDS = 0, 1000, 21
SHOWN = ("resnet20", "resnet18", "mobilenet_v2", "deit_tiny", "squeezenet")
TARGETS = ("onnxruntime", "fx_int8")
LIMITS = (0.35, 0.5, 0.65, 0.8)
"""Limits of milliseconds against float; those that no plan keeps, or that bind no plan, are left out."""
GOAL = 15.0
"""Percent that a prediction may be off."""

Row = dict[str, str | float | None]


def prepared(name: str, target: str) -> tuple[Program, CalibrationSet]:
    """Return a network calibrated and scored just enough for the program to have something to weigh."""
    network = NETWORKS[name]
    images = CalibrationSet((network.calibration(16),))
    settings = Settings(
        bits=(4, 8, 32), target=target, estimators=("weight_mse",), seed=SEED, threads=1, time_limit=10.0
    )
    program = flow.calibrate(prepare(capture(network.factory(), images), settings), images)
    return flow.measure_sensitivity(program, images), images


def held_out_plans(program: Program) -> dict[str, BitAllocation]:
    """Return plans to predict: the two ends, plans that mix at random, and what the program makes of limits."""
    widest = widest_plan(program).choices
    names = [site.name for site in program[Sites].sites]

    def with_floats(floats: frozenset[str]) -> BitAllocation:
        return BitAllocation({site: FLOAT if site in floats else choice for site, choice in widest.items()})

    plans = {"all float": with_floats(frozenset(names)), "all integers": with_floats(frozenset())}
    for index, floats in enumerate(mixed_plans(names, 6, CHECK_SEED)):
        plans[f"mixed {index + 1}"] = with_floats(floats)
    for limit in LIMITS:
        step = AllocateBits(Budget(latency_ratio=limit), time_limit=10.0, seed=SEED)
        try:
            plan = flow.run(program, step)[BitAllocation]
        except InfeasibleBudgetError:
            continue
        if len({choice.is_float for choice in plan.choices.values()}) > 1:
            plans[f"program at {limit}"] = plan
    return plans


def rows_of(name: str, target: str) -> tuple[list[Row], Row]:
    """Return a row for each plan, and the summary of a network in a runtime."""
    program, images = prepared(name, target)
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            program = measure_latency(program, images, cache=TimingCache(Path(folder)))
            seconds.append(time.perf_counter() - started)
    table = program[CostTables]["latency"]
    plans, one, compiler = held_out_plans(program), images.slice(0, 1).inputs, backend(target)
    runs = [compiler.compile(simulate(program, plan).module, one, threads=1) for plan in plans.values()]
    timings = time_runs([partial(run, one) for run in runs], threads=1, rounds=ROUNDS)
    float_ms = timings[0].milliseconds
    rows: list[Row] = []
    for (label, plan), timing in zip(plans.items(), timings, strict=True):
        predicted, ratio = table.of(plan.choices), timing.milliseconds / float_ms
        rows.append({"network": name, "target": target, "plan": label, "floats": _floats(plan.choices)})
        rows[-1] |= {"predicted ms": predicted, "measured ms": timing.milliseconds, "of float": ratio}
        rows[-1] |= {"error %": 100 * (predicted / table.float_cost / ratio - 1.0), "spread %": 100 * timing.spread}
        rows[-1] |= {"outliers %": 100 * timing.outliers, "counted": "no" if label.startswith("all") else "yes"}
    errors = [abs(float(row["error %"] or 0.0)) for row in rows if row["counted"] == "yes"]
    noise = table.noise
    assert noise is not None
    summary: Row = {
        "network": name,
        "target": target,
        "plans": len(errors),
        "median error %": statistics.median(errors),
    }
    summary |= {"worst error %": max(errors), "within 15 %": f"{sum(e <= GOAL for e in errors)} of {len(errors)}"}
    summary |= {"fit misses %": 100 * noise.error, "seconds": seconds[0], "seconds again": seconds[1]}
    summary |= {"pace %": 100 * (float_ms / table.float_cost - 1.0), "waiting %": 100 * noise.waiting}
    return rows, summary


def _floats(choices: dict[str, Choice]) -> str:
    return f"{sum(choice.is_float for choice in choices.values())} of {len(choices)}"


def main() -> None:
    """Measure, print the tables, write a JSON for each."""
    torch.set_num_threads(1)
    given = asked(__doc__, "network or target", (*SHOWN, *TARGETS))
    names = [name for name in given if name in NETWORKS] or list(SHOWN)
    targets = [name for name in given if name in BACKENDS] or list(TARGETS)
    rows: list[Row] = []
    summaries: list[Row] = []
    for name in names:
        for target in targets:
            found, summary = rows_of(name, target)
            rows += found
            summaries.append(summary)
            print(summary, flush=True)
    meta = {
        "seed": SEED,
        "check_seed": CHECK_SEED,
        "rounds": ROUNDS,
        "threads": 1,
        "limits": LIMITS,
        "goal_percent": GOAL,
    }
    write("latency_model", rows, {**meta, "summary": summaries})


if __name__ == "__main__":
    main()
