"""Do joint bits of weights and activations pay, and does a latency limit keep what it predicts?

`python -m benchmarks.joint_and_latency [joint | latency]`: (1) ResNet-20, W{2,4,8} x A{4,8} chosen together against
the same weights with A8, at equal bit operations (simulated; no runtime here has 4-bit activations), KL and accuracy
on labelled images. (2) ResNet-20 and MobileNetV2 in ONNX Runtime, W{4,8} A8 or float per layer: plans limited by
milliseconds against plans limited by bytes to the same file size; milliseconds as predicted by the table and as
measured, float and plan interleaved.
"""

from __future__ import annotations

import torch

from benchmarks.arguments import asked
from benchmarks.report_table import write
from benchmarks.sensitivity_quality import Evaluation
from benchmarks.zoo import NETWORKS
from fxquant import flow
from fxquant.api import capture, prepare
from fxquant.core.errors import InfeasibleBudgetError
from fxquant.core.facts import BitAllocation, Budget, CostTables, Settings
from fxquant.core.ir import Program
from fxquant.core.run import CalibrationSet
from fxquant.flow import allocate as search
from fxquant.flow import measure_latency
from fxquant.passes import widest_plan

SEED = 0
ESTIMATORS = ("gram", "diagonal", "fisher")
JOINT: dict[str, tuple[tuple[float, ...], tuple[int, ...], int, int]] = {
    "resnet20": ((0.047, 0.031, 0.023), (2, 4, 8), 96, 512),
}
"""Network -> limits of bit operations against float, weight bits, calibration images, test images."""
LATENCY: dict[str, tuple[tuple[float, ...], int]] = {"resnet20": ((0.75, 0.9), 64), "mobilenet_v2": ((0.6, 0.75), 48)}
"""Network -> limits of milliseconds against float, calibration images."""

Row = dict[str, str | float | None]


def prepared(name: str, settings: Settings, count: int) -> tuple[Program, CalibrationSet, CalibrationSet]:
    """Return a network's calibrated and scored program, its scoring and its held-out images."""
    network = NETWORKS[name]
    calibration = CalibrationSet((network.calibration(count),))
    scoring, held_out = calibration.split(0.33, SEED)
    program = flow.calibrate(prepare(capture(network.factory(), calibration), settings), scoring)
    return flow.measure_sensitivity(program, scoring), scoring, held_out


def joint(name: str) -> list[Row]:
    """Return what joint and weight-only plans keep at equal bit operations."""
    limits, bits, count, test = JOINT[name]
    rows: list[Row] = []
    for label, widths in (("W only, A8", (8,)), ("W and A jointly", (4, 8))):
        settings = Settings(
            bits=bits, activation_bits=widths, target="reference", estimators=ESTIMATORS, seed=SEED, time_limit=10.0
        )
        program, scoring, held_out = prepared(name, settings, count)
        evaluate = Evaluation(program, *NETWORKS[name].evaluation(test))
        for limit in limits:
            row: Row = {"network": name, "limit": f"bops_ratio {limit}", "plan": label}
            rows.append(row)
            try:
                solved = search.allocate(program, Budget(bops_ratio=limit), held_out, scoring=scoring)
            except InfeasibleBudgetError:
                row |= {"chosen": "infeasible"}
                continue
            plan = solved[BitAllocation]
            loss, accuracy = evaluate(plan)
            narrow = sum(choice.activation_bits == 4 for choice in plan.choices.values())
            row |= {"KL": loss, "accuracy %": accuracy, "used": plan.used["bops_ratio"], "chosen": plan.estimator}
            row |= {"layers at A4": f"{narrow} of {len(plan.choices)}", "float accuracy %": evaluate.float_accuracy}
    return rows


def latency(name: str) -> list[Row]:
    """Return predicted and measured milliseconds of latency-limited plans, and of size-limited ones of equal bytes."""
    limits, count = LATENCY[name]
    settings = Settings(bits=(4, 8, 32), estimators=ESTIMATORS, seed=SEED, threads=1, time_limit=10.0, rounds=0)
    program, _, held_out = prepared(name, settings, count)
    program = measure_latency(program, held_out)
    evaluate = Evaluation(program, *NETWORKS[name].evaluation(400))
    rows: list[Row] = []

    def add(label: str, plan: BitAllocation) -> None:
        tables = program[CostTables]
        measured = search.measured_latency(program, plan, held_out)
        predicted, taken = tables["latency"].of(plan.choices), measured["latency_ms"]
        loss, accuracy = evaluate(plan)
        rows.append({"network": name, "limit": label, "KL": loss, "accuracy %": accuracy})
        rows[-1] |= {"predicted ms": predicted, "measured ms": taken, "error %": 100 * (predicted - taken) / taken}
        rows[-1] |= {"of float": measured["latency_ratio"], "MB": tables["size"].of(plan.choices) / 1e6}
        floats = sum(choice.is_float for choice in plan.choices.values())
        rows[-1] |= {"layers in float": f"{floats} of {len(plan.choices)}", "chosen": plan.estimator}

    for limit in limits:
        try:
            plan = search.allocate(program, Budget(latency_ratio=limit), held_out)[BitAllocation]
        except InfeasibleBudgetError as error:
            rows.append({"network": name, "limit": f"latency_ratio {limit}", "chosen": str(error)[:120]})
            continue
        add(f"latency_ratio {limit}", plan)
        size = program[CostTables]["size"].of(plan.choices) / 1e6
        by_size = search.allocate(program, Budget(size_mb=size), held_out)[BitAllocation]
        add(f"size_mb {size:.3f} (the same bytes)", by_size)
    add("widest integers", widest_plan(program))
    return rows


def main() -> None:
    """Measure, print the tables, write a JSON for each."""
    torch.set_num_threads(1)
    parts = asked(__doc__, "part", ("joint", "latency"))
    if "joint" in parts:
        write("joint_bits", [row for name in JOINT for row in joint(name)], {"seed": SEED, "estimators": ESTIMATORS})
    if "latency" in parts:
        meta = {"seed": SEED, "threads": 1, "estimators": ESTIMATORS}
        write("latency_limits", [row for name in LATENCY for row in latency(name)], meta)


if __name__ == "__main__":
    main()
