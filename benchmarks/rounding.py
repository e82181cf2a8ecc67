"""What does each rung of the rounding ladder keep, on held-out images, and what does it take?

`python -m benchmarks.rounding [case[:plan[:seed]] ...]`: every (plan, seed, algorithm) is measured and kept in
`build/rounding/`, so that a killed run goes on and two can share the work; then all that is there makes the table.
Accuracy and KL to the float network are of labelled images that nothing was tuned on, of the simulated graph, and of
the lowered one where that is asked for; `calibration` columns are of the images that were tuned on, so that the
distance between the two can be seen. A quarter of the calibration images decides what is kept.
"A > distill" trains what A has rounded, on the same images.
Plans: "W4A4" is uniform with first and last layer at 8 bits, "W3A8 all" without that exception; "3 bits" is the
allocator's mixed plan of that many bits on average (W{2,4,8} A8).
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from benchmarks.arguments import asked
from benchmarks.report_table import RESULTS, write
from benchmarks.zoo import NETWORKS
from benchmarks.zoo.imdn import set5_psnr
from fxquant import flow
from fxquant.api import capture, prepare
from fxquant.backends.int8 import FxInt8Backend
from fxquant.core.facts import BitAllocation, Budget, Rounding, ScoringRounding, Settings
from fxquant.core.ir import Choice, Program, Sites
from fxquant.core.run import LOSSES, CalibrationSet, model_outputs
from fxquant.core.storage import ScoreStore, read_json, write_json
from fxquant.flow import allocate as search
from fxquant.flow import round_plan
from fxquant.passes import simulate

FOLDER = Path(__file__).resolve().parent.parent / "build" / "rounding"
BATCH = 32
CROP = 112
"""Side of the pictures that super-resolution is measured on: graphs have one shape."""
ALL = " all"

Row = dict[str, str | float | None]


@dataclass(frozen=True)
class Case:
    """What is measured on one network.

    Args:
        network: name in the zoo.
        plans: "W4A4", or "3 bits" for a mixed plan of that average.
        chains: algorithms.
        seeds: of the rounding; one is enough where nothing is random.
        calibration: images, a quarter of which is held out.
        evaluation: labelled images.
        options: settings of the reconstruction engine in the place of the profile's own.
        training: options of the training, in place of the defaults.
        bits: candidate weight bits of mixed plans.
        lowered: measure the integer graph too.
        pictures: the network restores pictures: PSNR on Set5 in the place of accuracy.
        scoring: how weights are rounded while layers are scored for mixed plans.
        target: runtime whose edges are quantized; None for ONNX Runtime, or ours where activations are narrower.
    """

    network: str
    plans: tuple[str, ...]
    chains: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    calibration: int = 1024
    evaluation: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)
    bits: tuple[int | str, ...] = (2, 4, 8)
    lowered: bool = True
    pictures: bool = False
    scoring: ScoringRounding = "nearest"
    target: str | None = None


LADDER = ("nearest", "bias_correction", "gptq", "gpfq", "adaround", "brecq", "qdrop", "pdquant")
CLOSED = (
    "nearest",
    "gptq",
    "gptq+bias_correction",
    "gptq_rescaled",
    "gptq_rescaled+bias_correction",
    "gpfq",
    "gpfq+bias_correction",
    "qronos",
    "qronos_rescaled",
    "qronos_rescaled+bias_correction",
)
"""Closed forms and their chains."""

EQUALIZED = (*CLOSED, "equalize+gptq_rescaled+bias_correction", "equalize+qronos_rescaled")

DRAWN = ("adaround", "brecq", "qdrop", "pdquant", "fast", "lowbit", "vit")
"""Algorithms that draw random numbers."""


TRAINED = " > "
"""Between a chain and the training behind it."""


def draws(chain: str) -> bool:
    """Whether a chain draws random numbers."""
    return TRAINED in chain or any(name in DRAWN for name in chain.split("+"))


SHORT: Mapping[str, object] = {"iterations": 200, "correction": 0, "prediction_every": 4}
"""A hundredth of the published iterations, the prediction at every fourth; corrected inputs are measured apart."""

CORRECTED: Mapping[str, object] = {**SHORT, "correction": 100}

CASES: dict[str, Case] = {
    "ladder": Case("resnet20", ("W4A4", "W3A3", "W2A4", "W2A2"), LADDER, (0, 1, 2), options=SHORT),
    "steps_then_qronos": Case(
        "resnet20",
        ("W4A4", "W3A3", "W2A4", "W2A2"),
        ("qronos_rescaled", "qdrop+qronos_rescaled"),
        options={"iterations": 100},
        lowered=False,
    ),
    "trained": Case(
        "resnet20",
        ("W4A4", "W3A3", "W2A4", "W2A2", "W2cA2"),
        ("qronos_rescaled", "qronos_rescaled > distill"),
        (0, 1, 2),
        training={"steps": 200, "towards": "logits"},
    ),
    "trained_v2": Case(
        "mobilenet_v2",
        ("W4A8", "W4A4", "W3A8"),
        ("qronos_rescaled", "qronos_rescaled > distill"),
        calibration=256,
        evaluation=500,
        training={"steps": 200, "batch": 8},
        lowered=False,
    ),
    "trained_deit": Case(
        "deit_tiny",
        ("W4A4",),
        ("qronos_rescaled", "qronos_rescaled > distill"),
        calibration=128,
        evaluation=500,
        training={"steps": 100, "batch": 8},
        lowered=False,
        target="simulation",
    ),
    **{
        f"prediction_{weight}": Case(
            "mobilenet_v2",
            ("W4A4",),
            ("pdquant",),
            calibration=128,
            evaluation=500,
            options={
                "iterations": 60,
                "batch": 8,
                "correction": 0,
                "prediction": weight,
                "prediction_every": 2,
            },
            lowered=False,
        )
        for weight in (0, 0.1, 1)
    },
    "mixed": Case("resnet20", ("3 bits", "2.5 bits", "W3A8 all"), ("nearest", "gptq", "pdquant"), options=SHORT),
    "mixed_by_gptq": Case(
        "resnet20",
        ("3 bits", "2.5 bits"),
        ("gptq", "pdquant"),
        options=SHORT,
        bits=(2, 3, 4, 8),
        scoring="gptq",
    ),
    "mixed_248_by_gptq": Case("resnet20", ("3 bits", "2.5 bits"), ("gptq",), scoring="gptq"),
    "corrected": Case(
        "resnet20", ("W2A4",), ("qdrop", "pdquant"), calibration=256, options={**SHORT, "correction": 100}
    ),
    "uncorrected": Case("resnet20", ("W2A4",), ("qdrop", "pdquant"), calibration=256, options=SHORT),
    # 256, 128 and 128 images are tuned on, and the rest decides.
    "closed_forms": Case("resnet20", ("W2A8 all", "W3A8 all", "W4A8 all"), CLOSED, calibration=342, lowered=False),
    "closed_forms_v1": Case("mobilenet_v1", ("W4A8 all",), EQUALIZED, calibration=170, evaluation=500, lowered=False),
    "closed_forms_v2": Case("mobilenet_v2", ("W4A8 all",), EQUALIZED, calibration=170, evaluation=400, lowered=False),
    "mobilenet_v1": Case(
        "mobilenet_v1",
        ("W4A8", "4 bits"),
        ("nearest", "bias_correction", "gptq", "gptq+bias_correction", "fast"),
        calibration=256,
        bits=(3, 4, 6, 8),
        options={"iterations": 100, "batch": 16, "prediction_every": 4},
    ),
    "mobilenet_v1_default": Case(
        "mobilenet_v1",
        ("4 bits",),
        ("pdquant",),
        calibration=256,
        bits=(3, 4, 6, 8),
        options={"iterations": 60, "batch": 16, "prediction_every": 4},
    ),
    "deit_tiny": Case(
        "deit_tiny",
        ("W4A8", "W4A4"),
        ("nearest", "gptq", "fast", "vit"),
        calibration=64,
        evaluation=300,
        options={"iterations": 40, "batch": 4},
        lowered=False,
        target="simulation",
    ),
    "imdn": Case(
        "imdn",
        ("W4A8",),
        ("nearest", "gptq", "gptq+bias_correction", "fast"),
        calibration=24,
        options={"iterations": 30, "batch": 4},
        lowered=False,
        pictures=True,
    ),
    "mobilenet_v2": Case(
        "mobilenet_v2",
        ("W4A8",),
        ("nearest", "gptq", "gptq+bias_correction", "fast"),
        calibration=64,
        evaluation=400,
        options={"iterations": 60, "batch": 8},
        lowered=False,
    ),
}


@cache
def prepared(name: str, plan: str) -> tuple[Program, CalibrationSet, CalibrationSet]:
    """Return a case's program with the plan, the images to tune on and those that decide."""
    case = CASES[name]
    network = NETWORKS[case.network]
    images = CalibrationSet((network.calibration(case.calibration),))
    tuning, held_out = images.split(0.25, 0)
    uniform = _uniform(plan)
    bits = case.bits if uniform is None else (uniform.weight.label, 4, 8)
    activations = (8,) if uniform is None else tuple(sorted({uniform.activation_bits, 8}))
    # ONNX Runtime has no narrower activations than 8 bits; our own integer graph does.
    target = case.target or ("onnxruntime" if activations == (8,) else "fx_int8")
    settings = Settings(
        bits=bits,
        activation_bits=activations,
        target=target,
        estimators=("diagonal", "fit"),
        rounds=0,
        scoring_rounding=case.scoring,
    )
    program = flow.calibrate(prepare(capture(network.factory(), images), settings), tuning.slice(0, 256))
    return program.with_facts(_plan(program, plan, uniform, tuning, held_out)), tuning, held_out


def _uniform(plan: str) -> Choice | None:
    return None if plan.endswith("bits") else Choice.parse(plan.removesuffix(ALL))


def _plan(
    program: Program, plan: str, uniform: Choice | None, tuning: CalibrationSet, held_out: CalibrationSet
) -> BitAllocation:
    sites = program[Sites].sites
    if uniform is not None:
        choices = {site.name: uniform for site in sites}
        ends = {sites[0].name: Choice(8, 8), sites[-1].name: Choice(8, 8)}
        return BitAllocation(choices if plan.endswith(ALL) else {**choices, **ends})
    scored = flow.measure_sensitivity(program, tuning.slice(0, 64))
    found = search.allocate(scored, Budget(average_bits=float(plan.split()[0])), held_out.slice(0, 64))
    return found[BitAllocation]


def scores(module: GraphModule, images: Tensor, labels: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return accuracy (%) and KL to the float answers."""
    answer = model_outputs(module, (images,), BATCH)
    right = 100 * float((answer.argmax(dim=1) == labels).double().mean())
    return right, float(LOSSES["kl"](reference, answer, None).mean())


def classified(case: Case, model: GraphModule, simulated: GraphModule, tuning: CalibrationSet) -> Row:
    """Return what a classifier keeps of its accuracy and of its answers."""
    images, labels = NETWORKS[case.network].evaluation(case.evaluation)
    reference, answers = model_outputs(model, (images,), BATCH), model_outputs(model, tuning.inputs, BATCH)
    row: Row = {"float %": 100 * float((reference.argmax(dim=1) == labels).double().mean())}
    row["accuracy %"], row["KL"] = scores(simulated, images, labels, reference)
    row["agreement %"], _ = scores(simulated, images, reference.argmax(dim=1), reference)
    tuned = scores(simulated, tuning.inputs[0], answers.argmax(dim=1), answers)
    row["calibration agreement %"], row["calibration KL"] = tuned
    if case.lowered:
        row["lowered %"], _ = scores(FxInt8Backend().lower(simulated), images, labels, reference)
    return row


def restored(model: GraphModule, simulated: GraphModule) -> Row:
    """Return what a super-resolution network keeps, in dB on Set5."""
    before, after = (set5_psnr(module, crop=CROP) for module in (model, simulated))
    return {"float dB": before, "PSNR dB": after}


def measure(name: str, plan: str, chain: str, seed: int, path: Path) -> None:
    """Measure one algorithm and keep its row."""
    case = CASES[name]
    program, tuning, held_out = prepared(name, plan)
    program = program.with_facts(replace(program[Settings], seed=seed))
    corrections = ScoreStore(FOLDER / f"corrections-{case.network}-{case.calibration}", {})
    started, worked = time.perf_counter(), time.process_time()
    rounded = program
    algorithms, _, training = chain.partition(TRAINED)
    if algorithms != "nearest":
        options = case.options if draws(algorithms) else {}
        rounded = round_plan(program, algorithms, tuning, held_out, overrides=options, corrections=corrections)
    if training:
        asked = replace(rounded[Settings], training=training, training_options=dict(case.training))
        rounded = flow.trained(rounded.with_facts(asked), tuning, held_out)
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    simulated = simulate(rounded, program[BitAllocation]).module
    row = restored(program.module, simulated) if case.pictures else classified(case, program.module, simulated, tuning)
    row |= {"seconds": seconds, "processor seconds": processor}
    units = rounded[Rounding].units if Rounding in rounded else ()
    row |= {"units": float(len(units)), "units kept": float(sum(unit.kept for unit in units))}
    notes = list(rounded[Rounding].notes) if Rounding in rounded else []
    write_json(
        path, "benchmark part", 1, {"row": row, "notes": notes, "plan": program[BitAllocation].to_json()["choices"]}
    )
    print(f"{name} {plan} {chain} {seed}: {row}", flush=True)


def table() -> list[Row]:
    """Return the mean of each row over its seeds, and the spread of the accuracy.

    Rows of cases that were not measured here are those of the last JSON.
    """
    known = (
        read_json(RESULTS / "rounding.json", "benchmark", 1)["rows"] if (RESULTS / "rounding.json").is_file() else []
    )
    rows: list[Row] = []
    for name, case in CASES.items():
        if not any(FOLDER.glob(f"{name}-*.json")):
            rows += [row for row in known if row["case"] == name]
        for plan in case.plans:
            for chain in case.chains:
                found: defaultdict[str, list[float]] = defaultdict(list)
                for path in sorted(FOLDER.glob(f"{name}-{plan}-{chain}-*.json".replace(" ", "_"))):
                    for key, value in read_json(path, "benchmark part", 1)["row"].items():
                        found[key].append(float(value))
                if found:
                    means: Row = {key: statistics.mean(values) for key, values in found.items()}
                    right = found["accuracy %"] or found["PSNR dB"]
                    means["spread"] = statistics.stdev(right) if len(right) > 1 else 0.0
                    named: Row = {
                        "case": name,
                        "network": case.network,
                        "plan": plan,
                        "rounding": chain,
                        "seeds": float(len(right)),
                    }
                    rows.append({**named, **means})
    return rows


def main() -> None:
    """Measure what is missing, print the table, write the JSON."""
    torch.set_num_threads(1)
    for wanted in asked(__doc__, "case[:plan[:seed]]", CASES):
        name, _, rest = wanted.partition(":")
        only, _, seed = rest.partition(":")
        case = CASES[name]
        for number in (int(seed),) if seed else case.seeds:
            for plan in (only,) if only else case.plans:
                for chain in case.chains:
                    path = FOLDER / f"{name}-{plan}-{chain}-{number}.json".replace(" ", "_")
                    if not path.exists() and (number == case.seeds[0] or draws(chain)):
                        measure(name, plan, chain, number, path)
    settings = {
        name: {"options": dict(case.options), "calibration": case.calibration, "evaluation": case.evaluation}
        for name, case in CASES.items()
    }
    write("rounding", table(), {"cases": settings, "held out": 0.25})


if __name__ == "__main__":
    main()
