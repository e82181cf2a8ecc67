"""Float against quantized in one runtime, interleaved, so that a busy machine treats both alike."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.fx import GraphModule

from fxquant.backends import backend
from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, Settings, Target
from fxquant.core.host import Speed, sample_interleaved
from fxquant.core.ir import Sites
from fxquant.passes import simulate, uniform_plans
from fxquant.result import Result

ROUNDS = 25
YARDSTICKS = ("uniform W8", "uniform W4")
"""Uniform plans that a mixed one is compared with, by how their names begin."""


def measure_speed(
    graphs: Mapping[str, GraphModule],
    inputs: tuple[Tensor, ...],
    target: str | Path | Target,
    threads: int | None = None,
    rounds: int = ROUNDS,
) -> list[Speed]:
    """Time float and simulated graphs in the runtime of a target.

    Args:
        graphs: name -> graph.
        inputs: what to run them on, images along axis 0.
        target: a target's name, the path of its file, or the target.
        threads: threads the runtime may use, None for its default.
        rounds: interleaved rounds, at least 2.

    Raises:
        OptionError: too few rounds, or an unknown target.
        LoweringError: a graph cannot be expressed there.
    """
    if rounds < 2:
        raise OptionError(f"rounds={rounds} is out of range; give 2 or more")
    runtime = backend(target)
    runs = [partial(runtime.compile(graph, inputs, threads), inputs) for graph in graphs.values()]
    speeds = []
    for name, samples in zip(graphs, sample_interleaved(runs, rounds), strict=True):
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        speeds.append(Speed(name, median, low, high))
    return speeds


def bench(result: Result, threads: int | None = None, rounds: int = ROUNDS) -> list[Speed]:
    """Time the float model ("float"), the plan ("mixed") and uniform plans of 8 and 4 bits on one image in its target.

    Args:
        result: what to time.
        threads: threads the runtime may use; None takes the result's settings.
        rounds: interleaved rounds, at least 2.

    Raises:
        OptionError: too few rounds, or the target's milliseconds are those of other hardware.
        LoweringError: the graph cannot be expressed there.
    """
    settings, target = result.program[Settings], result.program[Target]
    if target.latency:
        raise OptionError(
            f"target {target.name} gives its own milliseconds and does not run on this machine: there is nothing "
            "to time; see latency_ms in the summary"
        )
    one = tuple(tensor[:1] for tensor in result.example)
    graphs = {"float": result.program.module, "mixed": result.simulated}
    for name, choices in uniform_plans(result.program[Sites].sites).items():
        if choices != result.allocation.choices and name.startswith(YARDSTICKS):
            graphs[name] = simulate(result.program, BitAllocation(choices)).module
    return measure_speed(graphs, one, target, threads or settings.threads, rounds)
