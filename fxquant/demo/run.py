"""`fxquant demo`: quantize the shipped network, and compare it with float and uniform plans in one runtime."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.api import quantize
from fxquant.backends import backend
from fxquant.bench import measure_speed
from fxquant.core.facts import BitAllocation, Budget, BudgetLike
from fxquant.core.host import Reporter
from fxquant.core.ir import Choice, Sites
from fxquant.core.run import model_outputs
from fxquant.demo.digits import DigitsData, digits_data
from fxquant.demo.network import digits_network
from fxquant.outputs import check_packages, output_folder, write_outputs
from fxquant.report import comparison, runtime_text, speed_table
from fxquant.result import Result

BUDGET = Budget(average_bits=4)
"""What uniform 4 bits need: the question is what mixing buys at the same size."""

TARGET = "onnxruntime"
BATCH = 50
THREADS = 1
"""Sessions side by side would fight for the cores with their spinning helper threads."""

ROUNDS = 75
PARITY_IMAGES = 200


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo found.

    Args:
        rows: one for each model: name, accuracy, bytes of its ONNX file, milliseconds with quartiles.
        table: the rows as text.
        written: files to look at.
        seconds: wall time of everything.
    """

    rows: list[dict[str, Any]]
    table: str
    written: list[Path]
    seconds: float


def run_demo(output: Path, budget: BudgetLike | None = None, progress: bool = True) -> DemoOutcome:
    """Quantize the digits network, compare it with float and uniform 8 and 4 bits, and write model, plan and report.

    Args:
        output: folder to write to; results of an earlier demo there are replaced.
        budget: None for four bits on average.
        progress: bars on a terminal, elsewhere a line on stderr for each stage.

    Raises:
        InfeasibleBudgetError: no plan keeps the budget.
        OutputError: the folder cannot be written.
        MissingDependencyError: the demo extra is not installed.
    """
    started = time.perf_counter()
    with output_folder(output, resume=True):
        check_packages(TARGET)
        data = digits_data()
        result = quantize(digits_network(), data.calibration, budget or BUDGET, target=TARGET, progress=progress)
        plans = compared(result)
        graphs = {"float": result.program.module} | {name: plan.simulated for name, plan in plans.items()}
        rows = [
            {"name": name, "accuracy": accuracy(graph, data), "bytes": file_bytes(graph, plans.get(name))}
            for name, graph in Reporter(progress).track(graphs.items(), "compare models", len(graphs))
        ]
        rows = comparison(rows, measure_speed(graphs, (data.held_out[:1],), TARGET, THREADS, ROUNDS))
        extras = {
            "comparison": rows,
            "data": f"{len(data.held_out)} held-out digits, run in {TARGET}",
            "runtime": runtime_text(result.program, THREADS),
            "parity": parity(result, data.held_out[:PARITY_IMAGES]),
        }
        written = write_outputs(result, output, extras)
    return DemoOutcome(rows, speed_table(rows), written, time.perf_counter() - started)


def compared(result: Result) -> dict[str, Result]:
    """Return the result with uniform 8 bits, with uniform 4 bits and with the chosen plan."""
    plans = {}
    for bits in (8, 4):
        uniform = BitAllocation({site.name: Choice(bits, 8) for site in result.program[Sites].sites})
        plans[f"uniform W{bits}A8"] = result.with_plan(uniform)
    return {**plans, "mixed": result}


def accuracy(graph: GraphModule, data: DigitsData) -> float:
    """Return top-1 accuracy 0..1 on the held-out digits, computed by the runtime, not in simulation."""
    run = backend(TARGET).compile(graph, (data.held_out[:1],))
    answers = [run((images,)).argmax(dim=1) for images in torch.split(data.held_out, BATCH)]
    return float((torch.cat(answers) == data.held_out_labels).double().mean())


def file_bytes(graph: GraphModule, result: Result | None) -> int:
    """Return the size of the file that the runtime reads, of a result or of a float graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        export = backend(TARGET).export
        assert export is not None
        return export.write(graph, path, {} if result is None else result.metadata)


def parity(result: Result, images: Tensor) -> dict[str, Any]:
    """Return how far the runtime's answers are from the simulated ones."""
    simulated = model_outputs(result.simulated, (images,), BATCH)
    run = backend(TARGET).compile(result.simulated, (images[:1],))
    lowered = torch.cat([run((part,)) for part in torch.split(images, BATCH)])
    same = int((simulated.argmax(1) == lowered.argmax(1)).sum())
    spread = float(simulated.max() - simulated.min())
    return {
        "same digit": f"{same} of {len(images)} images",
        "largest difference of a logit": f"{float((simulated - lowered).abs().max()):.3g} (logits span {spread:.3g})",
    }
