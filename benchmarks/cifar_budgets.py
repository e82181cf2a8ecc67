"""How good are mixed plans on CIFAR-10 ResNet-20 at given average bits, by estimator, and what do they cost to find?

`python -m benchmarks.cifar_budgets`: W{2,4,8} A8, average bits 3, 3.5, 4, 5 and 6. Every estimator's own plan, and the
engine's (finalists of all estimators and the uniform plans measured on held-out calibration images, the best kept),
against uniform 4 and 8 bits and float, on 1017 test images that nothing was tuned on. One rounding for all (nearest,
scales of least squared error).
"""

from __future__ import annotations

import time
from dataclasses import replace

from torch import Tensor

from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from fxquant import pipeline, search
from fxquant.api import capture, prepare
from fxquant.core.allocation import BitAllocation, Finalists
from fxquant.core.budget import Budget
from fxquant.core.data import CalibrationSet
from fxquant.core.losses import kl
from fxquant.core.oracle import model_outputs
from fxquant.core.program import Program
from fxquant.core.sensitivity import SensitivityMatrix, Surrogates
from fxquant.core.settings import Settings
from fxquant.core.spec import Choice, Sites

AVERAGE_BITS = (3.0, 3.5, 4.0, 5.0, 6.0)
ESTIMATORS = ("gram", "diagonal", "pairs")
CALIBRATION_IMAGES = 256
SEED = 0

Row = dict[str, str | float]


def measured(program: Program, plan: BitAllocation, images: Tensor, labels: Tensor, reference: Tensor) -> Row:
    """Return held-out accuracy (%) and KL to the float model (nats) of a plan's simulated graph."""
    answer = model_outputs(pipeline.simulate(program, plan).module, (images,))
    correct = (answer.argmax(dim=1) == labels).double().mean()
    return {"accuracy %": round(100 * float(correct), 2), "KL": round(float(kl(reference, answer, None).mean()), 5)}


def scored(program: Program, scoring: CalibrationSet) -> tuple[Program, dict[str, tuple[float, float]]]:
    """Return the program with every estimator's matrix, and estimator -> (passes per image, seconds), alone."""
    matrices: dict[str, SensitivityMatrix] = {}
    spent: dict[str, tuple[float, float]] = {}
    for name in ESTIMATORS:
        alone = program.with_facts(replace(program[Settings], estimators=(name,)))
        started = time.perf_counter()
        matrices[name] = pipeline.measure_sensitivity(alone, scoring)[SensitivityMatrix]
        spent[name] = (matrices[name].evaluations, time.perf_counter() - started)
    return program.with_facts(matrices[ESTIMATORS[0]], Surrogates(matrices)), spent


def main() -> None:
    """Measure, print the table, write the JSON."""
    network = NETWORKS["resnet20"]
    images, labels = network.evaluation()
    calibration = CalibrationSet((network.calibration(CALIBRATION_IMAGES),))
    scoring, held_out = calibration.split(0.25, SEED)
    settings = Settings(bits=(2, 4, 8), seed=SEED, estimators=ESTIMATORS)
    program = prepare(capture(network.factory(), calibration), settings)
    program, spent = scored(pipeline.calibrate(program, scoring), scoring)
    reference = model_outputs(program.module, (images,))
    accuracy = 100 * float((reference.argmax(dim=1) == labels).double().mean())
    rows: list[Row] = [{"plan": "float", "average bits": 32.0, "accuracy %": round(accuracy, 2), "KL": 0.0}]
    for bits in (8, 4):
        uniform = BitAllocation({site.name: Choice(bits, 8) for site in program[Sites].sites})
        rows.append({"plan": f"uniform W{bits}A8", "average bits": 1.0 * bits})
        rows[-1] |= measured(program, uniform, images, labels, reference)
    for average in AVERAGE_BITS:
        started = time.perf_counter()
        solved = search.allocate(program, Budget(average_bits=average), held_out)
        seconds = time.perf_counter() - started
        for name in ESTIMATORS:
            plan, (passes, scoring_seconds) = solved[Finalists].plans[name], spent[name]
            rows.append({"plan": name, "average bits": average, **measured(program, plan, images, labels, reference)})
            rows[-1] |= {"used": round(plan.used["average_bits"], 3), "status": plan.status, "gap": plan.gap}
            rows[-1] |= {"passes": round(passes), "seconds": round(scoring_seconds, 1)}
        plan = solved[BitAllocation]
        rows.append({"plan": f"engine ({plan.estimator})", "average bits": average})
        rows[-1] |= measured(program, plan, images, labels, reference)
        rows[-1] |= {"used": round(plan.used["average_bits"], 3), "status": plan.status, "gap": plan.gap}
        passes = spent["gram"][0] + spent["pairs"][0]
        rows[-1] |= {"passes": round(passes), "seconds": round(seconds + sum(s for _, s in spent.values()), 1)}
    meta = {"network": "resnet20", "float accuracy %": accuracy, "test images": len(labels), "seed": SEED}
    write("cifar_budgets", rows, meta | {"scoring images": len(scoring), "held-out images": len(held_out)})


if __name__ == "__main__":
    main()
