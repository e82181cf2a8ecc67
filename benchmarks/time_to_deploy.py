"""How long is the way from a model to a deployed file, stage by stage, and how much memory does it take?

`python -m benchmarks.time_to_deploy [--networks ...] [--efforts ...]`: `fxquant.quantize` at an average of 5 bits, then
the ONNX file, the saved result, and both loaded again; processor seconds, seconds and peak memory of each stage on one
thread, every run in a separate process. What is finished is kept in `build/time_to_deploy`, so that a killed run goes
on; remove it after a change that matters. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxquant
from benchmarks import data
from benchmarks.report_table import RESULTS, write
from benchmarks.stage_clock import StageClock
from benchmarks.task_table import TASKS
from benchmarks.zoo import NETWORKS
from benchmarks.zoo.decoder import codes, decoder
from fxquant.backends.onnx import open_session, session_options
from fxquant.core.errors import FileFormatError
from fxquant.core.facts import EFFORTS
from fxquant.core.storage import read_json, write_json

FOLDER = Path("build/time_to_deploy")
BUDGET = "average_bits=5"
STAGES = (
    "capture",
    "calibrate",
    "grids",
    "score",
    "solve",
    "verify",
    "round",
    "curve",
    "export",
    "session",
    "save",
    "load",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network with its calibration images.

    Args:
        model: builds it.
        images: of a number, which not every network takes.
        count: images that are asked for; efforts may take fewer.
    """

    model: Callable[[], nn.Module]
    images: Callable[[int], object]
    count: int


def _known(name: str, count: int) -> Case:
    network = NETWORKS[name]
    return Case(network.factory, network.calibration, count)


CASES: dict[str, Case] = {
    "resnet20": _known("resnet20", 256),
    "mobilenet_v2": _known("mobilenet_v2", 256),
    "deit_tiny": _known("deit_tiny", 128),
    "decoder": Case(decoder, codes, 64),
    "ptb_lstm": Case(TASKS["ptb_lstm"].model, lambda _: TASKS["ptb_lstm"].calibration(), 64),
}


def deployed(name: str, effort: str) -> Row:
    """Return what each stage of a network took at an effort."""
    torch.set_num_threads(1)
    case, clock = CASES[name], StageClock()
    model, images = case.model(), case.images(case.count)
    data.forget_decoded()
    with clock.quantizing(), clock.stage("capture"):
        result = fxquant.quantize(model, images, BUDGET, options={"effort": effort, "threads": 1})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        clock("export", lambda: result.to_onnx(path))
        clock("session", lambda: open_session(path, session_options(1)))
        clock("save", lambda: result.save(folder))
        clock("load", lambda: fxquant.load(folder))
    row: Row = {"network": name, "effort": effort, "images": case.count}
    row |= {stage: round(clock.taken[stage][0], 2) if stage in clock.taken else 0.0 for stage in STAGES}
    processor, wall, peaks = (list(part) for part in zip(*clock.taken.values(), strict=True))
    row |= {"processor s": round(sum(processor), 1), "s": round(sum(wall), 1), "peak MB": round(max(peaks))}
    row |= {"peak in": max(clock.taken, key=lambda stage: clock.taken[stage][2])}
    return row | {f"{stage} MB": round(clock.taken[stage][2]) for stage in STAGES if stage in clock.taken}


def measured(name: str, effort: str) -> Row:
    """Return the row of a network at an effort, measured in a separate process, or by an earlier run."""
    place = FOLDER / f"{name}-{effort}.json"
    if not place.is_file():
        command = [sys.executable, "-m", "benchmarks.time_to_deploy", "--networks", name, "--efforts", effort]
        subprocess.run([*command, "--into", str(place)], check=True)
    row: Row = read_json(place, "time to deploy", 1)["row"]
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON; rows that were not measured now stay in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--efforts", nargs="+", choices=list(EFFORTS), default=list(EFFORTS))
    parser.add_argument("--into", type=Path, help="measure one network at one effort here, into this file")
    given = parser.parse_args(arguments)
    if given.into is not None:
        row = deployed(given.networks[0], given.efforts[0])
        write_json(given.into, "time to deploy", 1, {"row": row})
        return
    rows = {(name, effort): measured(name, effort) for name in given.networks for effort in given.efforts}
    with suppress(FileFormatError):
        for row in read_json(RESULTS / "time_to_deploy.json", "benchmark", 1)["rows"]:
            _ = rows.setdefault((row["network"], row["effort"]), row)
    order = sorted(rows, key=lambda key: (list(CASES).index(key[0]), list(EFFORTS).index(key[1])))
    meta = {"threads": 1, "budget": BUDGET, "stages": "processor s, and MB: peak of the process"}
    write("time_to_deploy", [rows[key] for key in order], meta)


if __name__ == "__main__":
    main()
