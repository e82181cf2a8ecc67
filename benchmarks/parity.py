"""Do all runtimes give the answers of the plan, image for image, and what may one expect of a float simulation?

`python -m benchmarks.parity [--networks resnet20,...] [--runtimes onnxruntime,fx_int8,compiled]`: uniform W8A8 and
W4A8 of each network over its labelled images. Every runtime is compared with its exact reference (which rounds by the
runtime's own formula) and with the simulation (`fxquant.check`). The rows named `itself` compare the simulation with
itself: the same graph with its sums formed in float64, and with its images in channels-last order, which only changes
in which order float32 sums are formed. What those differ by is what any computation differs by from a float32 one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx.node import Target

from benchmarks.report_table import write
from benchmarks.zoo import NETWORKS
from fxquant import flow
from fxquant.api import capture, prepare
from fxquant.backends.exact import BATCH
from fxquant.core.facts import BitAllocation, Settings
from fxquant.core.ir import OPS, Choice, Sites
from fxquant.core.run import CalibrationSet, first_tensor, model_outputs
from fxquant.parity import compare
from fxquant.passes import simulate

DEFAULT_NETWORKS = ("resnet20", "squeezenet", "mobilenet_v2", "deit_tiny")
CALIBRATION_IMAGES = 32
IMAGES = {"resnet20": 1017}
DEFAULT_IMAGES = 64

Row = dict[str, str | float]


class WideSums(Interpreter):
    """Runs a graph with convolutions and matrix products in float64."""

    def call_function(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op."""
        rule = OPS.get(target)
        if rule is None or rule.macs is None:
            return super().call_function(target, args, kwargs)
        wide = tuple(value.double() if isinstance(value, Tensor) else value for value in args)
        return super().call_function(target, wide, kwargs).float()


def itself(simulated: GraphModule, images: Tensor) -> list[Row]:
    """Return how far the simulation is from itself when only the order or width of float sums changes."""
    expected = model_outputs(simulated, (images,), BATCH)
    wide, rows = WideSums(simulated), list[Row]()
    with torch.no_grad():
        in_float64 = torch.cat([first_tensor(wide.run(part)) for part in torch.split(images, BATCH)])
    last = model_outputs(simulated, (images.contiguous(memory_format=torch.channels_last),), BATCH)
    for name, answer in (("itself, sums in float64", in_float64), ("itself, channels last", last)):
        apart = (answer - expected).abs() / ((expected.max() - expected.min()) / 255)
        same = (answer.argmax(1) == expected.argmax(1)).double().mean()
        row: Row = {"reference": "simulated", "runtime": name, "same class %": round(100 * float(same), 2)}
        rows.append(row | {"mean step": round(float(apart.mean()), 4), "max step": round(float(apart.max()), 2)})
    return rows


def rows_of(name: str, runtimes: Sequence[str]) -> list[Row]:
    """Return the rows of one network."""
    network = NETWORKS[name]
    images, labels = network.evaluation(IMAGES.get(name, DEFAULT_IMAGES))
    calibration = CalibrationSet((network.calibration(CALIBRATION_IMAGES),))
    program = prepare(capture(network.factory(), calibration), Settings(bits=(4, 8)))
    program = flow.calibrate(program, calibration)
    rows = []
    for bits in (8, 4):
        plan = BitAllocation({site.name: Choice(bits, 8) for site in program[Sites].sites})
        simulated = simulate(program, plan).module
        found = compare(simulated, CalibrationSet((images,), labels), runtimes)
        shared: Row = {"network": name, "plan": f"W{bits}A8", "images": len(images)}
        for pair in found.pairs:
            row = shared | {"reference": pair.reference, "runtime": pair.runtime}
            if pair.agreement is not None:
                row["same class %"] = round(100 * pair.agreement, 2)
            row |= {"mean step": round(pair.mean_step, 4), "max step": round(pair.max_step, 2)}
            row |= {"layer step": round(pair.layer_step, 4), "diverges at": pair.first or "nowhere"}
            row["top-1 %"] = round(100 * found.accuracy[pair.runtime], 2)
            rows.append(row)
        rows += [shared | row for row in itself(simulated, images)]
        print(name, bits, found.summary(), sep="\n", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(DEFAULT_NETWORKS), help="names of benchmarks.zoo")
    parser.add_argument("--runtimes", default="onnxruntime,fx_int8", help="what to compare with")
    chosen = parser.parse_args(arguments)
    runtimes = chosen.runtimes.split(",")
    rows = [row for name in chosen.networks.split(",") for row in rows_of(name, runtimes)]
    write(
        "parity",
        rows,
        {"calibration images": CALIBRATION_IMAGES, "batch": BATCH, "seed": 0, "threads": torch.get_num_threads()},
    )


if __name__ == "__main__":
    main()
