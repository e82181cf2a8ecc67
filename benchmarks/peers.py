"""Is fxquant the fastest of its runtime? Float and 8-bit networks of all peers, interleaved in one run.

`python -m benchmarks.peers [--networks resnet18,...] [--batches 1,8] [--threads 1,2] [--rounds 30] [--only part,...]`
needs openvino, nncf and torchao beside fxquant's own packages; a contestant whose package is missing is left out and
named in the JSON. Each contestant runs in its own process (`benchmarks.contestants`); one after the other they are
asked for a few calls, round after round. Rows are kept in `build/peers` as they come, so that a run can go on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.contestants import CALIBRATION_IMAGES, CONTESTANTS, images, model
from benchmarks.contestants_files import write_files
from benchmarks.report_table import write
from fxquant.core.storage import read_json, write_json

NETWORKS = ("resnet18", "mobilenet_v2", "deit_tiny", "squeezenet", "resnet20")
FOLDER = Path("build/peers")
SHORTEST_TURN_MS = 20.0
PEAK_GOPS = {1: 490.0, 2: 850.0}
"""Threads -> int8 multiply-adds this kind of machine has been seen to do, in 10^9 operations a second (kernels.md)."""

RATIOS = {
    "ORT fxquant / best quantize_static": ("ORT fxquant", "ORT quantize_static"),
    "OpenVINO fxquant / NNCF": ("OpenVINO fxquant", "OpenVINO NNCF"),
    "compiled fxquant / torchao": ("fxquant compiled", "torchao"),
    "eager float / fxquant": ("torch eager", "fxquant eager"),
    "ORT float / fxquant": ("ORT fp32", "ORT fxquant"),
}
"""Column -> contestants whose names start so; of several the fastest counts."""

Row = dict[str, str | int | float | None]


class Contestant:
    """One process and the milliseconds it took per call, round by round."""

    def __init__(self, name: str, network: str, batch: int, threads: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.contestants", name, network, str(batch), str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TF_CPP_MIN_LOG_LEVEL": "3"}
        log = FOLDER / network / f"{name.replace(' ', '_').replace('/', '_')}.log"
        self.log = log
        self.process = subprocess.Popen(
            [*command, str(FOLDER / network)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        self.wall: list[float] = []
        self.busy: list[float] = []
        self.calls = 1

    def ready(self) -> bool:
        """Wait until it can be timed; False if it never will be."""
        assert self.process.stdout is not None
        return bool(self.process.stdout.readline())

    def turn(self) -> dict[str, float]:
        """Ask for some calls and return the milliseconds of one."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(self.calls, file=self.process.stdin, flush=True)
        answer: dict[str, float] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(network: str, batch: int, threads: int, rounds: int, names: Sequence[str]) -> tuple[Row, list[str]]:
    """Return the row of one network, batch and number of threads, and who could not take part."""
    running: dict[str, Contestant] = {}
    absent = []
    # Compilers work on one core each: two contestants get ready at a time.
    for first in range(0, len(names), 2):
        for contestant in [Contestant(name, network, batch, threads) for name in names[first : first + 2]]:
            if contestant.ready():
                running[contestant.name] = contestant
            else:
                contestant.close()
                absent.append(f"{contestant.name} on {network}: {_last_line(contestant.log)}")
    for contestant in running.values():
        contestant.calls = max(1, round(SHORTEST_TURN_MS / contestant.turn()["wall"]))
    for number in range(rounds):
        order = list(running.values())
        for contestant in order[number % len(order) :] + order[: number % len(order)]:
            answer = contestant.turn()
            contestant.wall.append(answer["wall"])
            contestant.busy.append(answer["cpu"])
    row: Row = {"network": network, "batch": batch, "threads": threads}
    for name, contestant in running.items():
        contestant.close()
        row[f"{name} ms"] = round(statistics.median(contestant.wall), 3)
        row[f"{name} cpu ms"] = round(statistics.median(contestant.busy), 3)
        row[f"{name} quartiles ms"] = " to ".join(f"{q:.3g}" for q in _quartiles(contestant.wall))
    clocks = {"": {name: c.wall for name, c in running.items()}, " cpu": {name: c.busy for name, c in running.items()}}
    for clock in clocks if threads == 1 else ("",):
        row |= ratios(clocks[clock], clock)
    return row, absent


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1][:200] if lines else "it ended without a word"


def ratios(rounds: Mapping[str, Sequence[float]], clock: str = "") -> Row:
    """Return the ratios of `RATIOS`: the median over the rounds, which leaves out a machine's slow moments.

    Args:
        rounds: contestant -> its milliseconds, round by round; of several that a column asks for the fastest counts.
        clock: what columns end in; on one thread processor time is compared as well as wall time.
    """
    found: Row = {}
    for column, starts in RATIOS.items():
        fits = [[name for name in rounds if name.startswith(start)] for start in starts]
        if not all(fits):
            found[column + clock] = None
            continue
        above, below = (rounds[min(names, key=lambda name: statistics.median(rounds[name]))] for names in fits)
        found[column + clock] = round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)
    return found


def peak_share(row: Row, network: str) -> Row:
    """Return the share of the machine's int8 peak (%) that our runtimes reach: operations / time / peak."""
    gigaoperations = 2e-9 * multiply_adds(network) * int(str(row["batch"]))
    found: Row = {}
    for name in ("ORT fxquant", "OpenVINO fxquant", "fxquant eager", "fxquant compiled"):
        milliseconds = row.get(f"{name} ms")
        if isinstance(milliseconds, float):
            reached = gigaoperations / (milliseconds / 1e3)
            found[f"{name} % of peak"] = round(100 * reached / PEAK_GOPS[int(str(row["threads"]))], 1)
    return found


def multiply_adds(network: str) -> int:
    """Return the multiply-adds of one image in convolutions and linear layers."""
    total = 0

    def count(module: torch.nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        total += output.numel() // weight.shape[0] * weight.numel()

    float_model = model(network)
    for module in float_model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        float_model(images(network, 1))
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names of benchmarks.zoo, comma-separated")
    parser.add_argument("--batches", default="1,8", help="images per call, comma-separated")
    parser.add_argument("--threads", default="1,2", help="threads, comma-separated")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of every contestant")
    parser.add_argument("--only", default="", help="contestants whose name contains one of these, comma-separated")
    parser.add_argument("--kept", action="store_true", help="measure nothing: write the table of the rows kept so far")
    chosen = parser.parse_args(arguments)
    names = [name for name in CONTESTANTS if any(part in name for part in chosen.only.split(","))]
    rows: list[Row] = []
    absent: list[str] = []
    for network in chosen.networks.split(","):
        if not chosen.kept:
            absent += write_files(network, FOLDER / network)
        for batch in map(int, chosen.batches.split(",")):
            for threads in map(int, chosen.threads.split(",")):
                part = FOLDER / f"{network}-{batch}-{threads}-{chosen.rounds}-{chosen.only or 'all'}.json"
                if chosen.kept and not part.is_file():
                    continue
                if not part.is_file():
                    row, missing = measure(network, batch, threads, chosen.rounds, names)
                    write_json(part, "benchmark part", 1, {"row": row, "absent": missing})
                kept = read_json(part, "benchmark part", 1)
                rows.append(kept["row"] | peak_share(kept["row"], network))
                absent += kept["absent"]
                print({k: v for k, v in rows[-1].items() if "ms" not in k or k.endswith(" ms")}, flush=True)
    meta = {
        "rounds": chosen.rounds,
        "calibration images": CALIBRATION_IMAGES,
        "seed": 0,
        "precision": "W8A8",
        "int8 peak GOP/s by threads": {str(k): v for k, v in PEAK_GOPS.items()},
        "left out": absent,
    }
    write("peers", rows, meta)


if __name__ == "__main__":
    main()
