"""Does a run that is killed at any moment go on to the same answer, bit for bit?

`python -m benchmarks.faults [--stages scoring,saving,...] [--kills 50] [--signal KILL|INT] [--seed 0]`. For each long
stage the command line runs on a small network in a forked process (forking saves the seconds that imports take), is
killed at a random moment of that stage, `CHAIN` times on one folder, and then runs to its end; all that it wrote is
compared with what an undisturbed run wrote. Moments are drawn with a seed, evenly over the time that the stage took
undisturbed. With `--signal INT` it is stopped as by Ctrl-C instead, and has to end with code 130 and one line.

Milliseconds differ from run to run, so in the stage `latency` each measurement is carried out and then replaced by a
number that depends on its position only. In the stage `shards` two processes share the scoring as under torchrun, and
one of them, the first or the second, is killed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import select
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.report_table import write
from fxquant import api
from fxquant.cli import commands as cli
from fxquant.core.host import Timing
from fxquant.core.storage import UNFINISHED

CHAIN = 5
"""Kills on one folder before the run that goes on to the end."""
PATIENCE = 300.0
"""Seconds after which a process counts as hanging."""
LAST_WORDS = 15.0
"""Seconds that the other processes have to stop once one died."""


class Net(nn.Module):
    """Four convolutions with a residual, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of shape (N, 5)."""
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        scores: Tensor = self.head(torch.relu(self.wide(x)).mean(dim=(2, 3)))
        return scores


def net() -> nn.Module:
    """Return the network with seeded weights."""
    torch.manual_seed(0)
    return Net().eval()


def images() -> Tensor:
    """Return seeded images, float32 of shape (64, 3, 12, 12)."""
    return torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1))


SPECS = ("--model", "benchmarks.faults:net", "--calibration", "benchmarks.faults:images")
REFERENCE = ("--target", "reference")
BUDGET = ("--budget", "average_bits=5")


@dataclass(frozen=True)
class Stage:
    """One stage and the command that comes through it.

    Args:
        name: for the table.
        function: dotted name of what does the stage, as its caller finds it.
        command: arguments in front of the folder; without a base the folder is new and the model is given.
        base: name of the stage whose undisturbed result the command starts from; "" for none.
        processes: that share the work.
    """

    name: str
    function: str
    command: tuple[str, ...]
    base: str = ""
    processes: int = 1

    def arguments(self, folder: Path, again: bool) -> list[str]:
        """Return the command line for a folder."""
        if self.base:
            name, *more = self.command
            return [name, str(folder), *more]
        return [*self.command, *SPECS, "--output", str(folder), *(["--resume"] if again else [])]


PAIRS = ("--estimators", "pairs,gram,fisher")
STAGES = (
    Stage("calibration", "fxquant.flow.calibrate", ("analyze", *REFERENCE, *PAIRS)),
    Stage("scoring", "fxquant.flow.measure_sensitivity", ("analyze", *REFERENCE, *PAIRS)),
    Stage("shards", "fxquant.flow.measure_sensitivity", ("analyze", *REFERENCE, *PAIRS), processes=2),
    Stage("search", "fxquant.flow.allocate.allocate", ("quantize", *BUDGET, *REFERENCE, "--rounding", "nearest")),
    Stage(
        "latency",
        "fxquant.flow.allocate.allocate",
        ("quantize", "--budget", "latency_ratio=9", *BUDGET, "--effort", "fast", "--threads", "1"),
    ),
    Stage(
        "reconstruction",
        "fxquant.api.round_with_feedback",
        ("reconstruct", *SPECS[2:], "--rounding-option", "iterations=60", "--rounding-option", "batch=16"),
        base="search",
    ),
    Stage("saving", "fxquant.cli.commands.write_outputs", ("allocate", "--budget", "average_bits=4"), base="onnx"),
    Stage("onnx", "fxquant.cli.commands.write_outputs", ("quantize", *BUDGET, "--effort", "fast")),
)
"""Calibration, scoring alone and shared, search with measured refinement, latency, reconstruction, and everything that
is written at the end: over an earlier result, and into a new folder."""


def _steady(timings: list[Timing]) -> list[Timing]:
    return [replace(each, milliseconds=1.0 + 0.01 * index) for index, each in enumerate(timings)]


def _patch(function: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    place, _, name = function.rpartition(".")
    module = importlib.import_module(place)
    setattr(module, name, wrap(getattr(module, name)))


def _child(stage: Stage, arguments: list[str], marks: int, log: Path, rank: int, port: int) -> None:
    """Run the command in this process, telling when the stage begins and ends."""
    torch.set_num_threads(1)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if stage.processes > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(stage.processes), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(stage.processes)}

    def marked(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            os.write(marks, b"<")
            try:
                return original(*args, **kwargs)
            finally:
                os.write(marks, b">")

        return run

    _patch(stage.function, marked)
    for place in ("fxquant.passes.measure_latency.time_runs", "fxquant.flow.allocate.time_runs"):
        _patch(place, lambda original: lambda *a, **k: _steady(original(*a, **k)))
    code = 99
    try:
        code = cli.main(arguments)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


@dataclass
class Running:
    """Processes of one run, and what they report of the stage."""

    numbers: list[int]
    marks: int
    seen: bytes = b""

    def wait_for(self, mark: bytes, seconds: float) -> bool:
        """Whether the mark came within this time; not if the processes ended first."""
        ends = time.monotonic() + seconds
        while mark not in self.seen:
            ready, _, _ = select.select([self.marks], [], [], max(0.0, ends - time.monotonic()))
            if not ready:
                return False
            more = os.read(self.marks, 64)
            if not more:
                return False
            self.seen += more
        return True

    def end(self) -> list[int]:
        """Return the exit codes, negative for signals; what hangs is killed and counts as 98.

        Where one of several processes dies the others are asked to stop, and killed in the end, as torchrun does.
        """
        ends, codes, asked = time.monotonic() + PATIENCE, dict[int, int](), False
        while len(codes) < len(self.numbers):
            for number in set(self.numbers) - set(codes):
                done, status = os.waitpid(number, os.WNOHANG)
                if done:
                    codes[number] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > ends:
                    os.kill(number, signal.SIGKILL)
                    os.waitpid(number, 0)
                    codes[number] = -signal.SIGKILL if asked else 98
            if not asked and any(codes.values()):
                ends, asked = time.monotonic() + LAST_WORDS, True
                for number in set(self.numbers) - set(codes):
                    os.kill(number, signal.SIGTERM)
            time.sleep(0.005)
        os.close(self.marks)
        return [codes[number] for number in self.numbers]


def start(stage: Stage, folder: Path, again: bool) -> Running:
    """Fork the processes of a run."""
    reading, writing = os.pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    numbers = []
    for rank in range(stage.processes):
        number = os.fork()
        if number == 0:
            os.close(reading)
            _child(stage, stage.arguments(folder, again), writing, folder.with_suffix(".log"), rank, port)
        numbers.append(number)
    os.close(writing)
    return Running(numbers, reading)


def answer(folder: Path) -> dict[str, str]:
    """Return a digest of everything a run left, but for what tells of time: seconds, evaluations, reports."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                data = b"".join(key.encode() + _timeless(key, archive[key]).tobytes() for key in sorted(archive.files))
        elif path.suffix in (".json", ".onnx", ".safetensors") and path.name != "report.json":
            data = path.read_bytes()
        else:
            # Present or not; a program file holds the paths of its build.
            data = b""
        found[name] = sha256(data).hexdigest()
    return found


def _timeless(key: str, value: NDArray[Any]) -> NDArray[Any]:
    """Return an array without what a run that goes on spends more of: time, and evaluations."""
    if key == "evaluations" or "seconds" in key:
        return np.zeros(0)
    if key == "record":
        # Losses before and after, whether it was kept, seconds.
        return value[:3]
    if key == "header":
        header = json.loads(str(value))
        _ = header.pop("evaluations", None)
        for unit in header.get("units", ()):
            unit["seconds"] = 0.0
        return np.array(json.dumps(header))
    return value


def stopped(stage: Stage, folder: Path, kind: signal.Signals, moment: float, again: bool, chance: random.Random) -> str:
    """Run until a moment in the stage and stop it there; return "in stage", "late" or what went wrong."""
    running = start(stage, folder, again)
    if not running.wait_for(b"<", PATIENCE):
        return f"never came to the stage, codes {running.end()}"
    over = running.wait_for(b">", moment)
    number = chance.choice(running.numbers)
    for each in [number] if kind == signal.SIGKILL else running.numbers:
        with suppress(ProcessLookupError):
            os.kill(each, kind)
    codes = running.end()
    if over or all(code == 0 for code in codes):
        return "late"
    if kind == signal.SIGINT:
        log = folder.with_suffix(".log").read_text(encoding="utf-8").rstrip().splitlines()
        if any(code != cli.INTERRUPTED for code in codes) or not log[-1].startswith("fxquant: stopped; "):
            return f"codes {codes}, last line {log[-1][:200]!r}"
    return "in stage"


def undisturbed(stage: Stage, place: Path, bases: dict[str, Path]) -> tuple[Path, float]:
    """Return the folder of a run that nothing stops, and the seconds of its stage."""
    folder = place / f"{stage.name}-whole"
    if stage.base:
        shutil.copytree(bases[stage.base], folder)
    running = start(stage, folder, again=False)
    began = time.monotonic()
    if running.wait_for(b"<", PATIENCE):
        began = time.monotonic()
        running.wait_for(b">", PATIENCE)
    seconds = time.monotonic() - began
    codes = running.end()
    if any(codes):
        raise SystemExit(f"{stage.name}: the undisturbed run failed\n{folder.with_suffix('.log').read_text()[-3000:]}")
    return folder, seconds


def trial(
    stage: Stage, place: Path, bases: dict[str, Path], kills: int, kind: signal.Signals, seed: int
) -> Iterator[dict[str, Any]]:
    """Kill a stage so many times, and yield the row of the table as far as it is known after each answer."""
    whole, seconds = undisturbed(stage, place, bases)
    expected = answer(whole)
    chance = random.Random(f"{seed} {stage.name}")
    moments, done, late, ends, wrong = list[float](), 0, 0, 0, list[str]()
    began = time.monotonic()
    while done < kills and late < 3 * kills:
        folder = place / f"{stage.name}-{ends}"
        if stage.base:
            shutil.copytree(bases[stage.base], folder)
        for again in range(min(CHAIN, kills - done)):
            share = chance.random()
            outcome = stopped(stage, folder, kind, share * seconds, again > 0, chance)
            done += outcome == "in stage"
            late += outcome == "late"
            if outcome == "late":
                # The undisturbed run was the slower one: the machine is shared.
                seconds *= 0.9
            elif outcome == "in stage":
                moments.append(round(share, 3))
            else:
                wrong.append(outcome)
        codes = start(stage, folder, again=True).end()
        ends += 1
        if any(codes):
            wrong.append(f"going on ended with {codes}: {folder.with_suffix('.log').read_text()[-300:]!r}")
        else:
            found = answer(folder)
            differ = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            if differ:
                wrong.append(f"other answer in {differ[:5]}")
        left = [str(path) for path in folder.rglob(f"{UNFINISHED}*")]
        if left:
            wrong.append(f"left over: {left[:3]}")
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{stage.name}: {done} stops, {late} late, {ends} answers, {len(wrong)} wrong {wrong[-1:]}", flush=True)
        yield {
            "stage": stage.name,
            "command": stage.command[0],
            "seconds of the stage": round(seconds, 2),
            "stops in it": done,
            "stops that came late": late,
            "earliest": min(moments, default=0.0),
            "latest": max(moments, default=0.0),
            "answers compared": ends,
            "same": ends - len(wrong),
            "wrong": wrong,
            "took": round(time.monotonic() - began),
        }
        if len(wrong) > 3:
            break


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--stages", default=",".join(stage.name for stage in STAGES))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", choices=("KILL", "INT"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="faults")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    kind, asked = signal.Signals[f"SIG{args.signal}"], args.stages.split(",")
    stages = {stage.name: stage for stage in STAGES}
    # Whatever torch loads when it first traces a network, the children have from the start.
    program = api.capture(net(), [images()[:2]])
    _ = api.prepare(program)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fxquant-faults-") as name:
        place = Path(name)
        os.environ["FXQUANT_CACHE"] = str(place / "cache")
        bases: dict[str, Path] = {}
        (place / "bases").mkdir()
        for base in sorted({stages[each].base for each in asked} - {""}):
            bases[base], _ = undisturbed(stages[base], place / "bases", bases)
        for each in asked:
            rows.append({})
            for rows[-1] in trial(stages[each], place, bases, args.kills, kind, args.seed):
                # Hours of work are not kept for the end.
                write(args.output, rows, {"signal": args.signal, "seed": args.seed, "kills on one folder": CHAIN})


if __name__ == "__main__":
    main()
