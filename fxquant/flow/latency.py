"""What plans take on this machine: the measured model, as a cost like any other."""

from __future__ import annotations

from functools import partial

from torch.fx import GraphModule

from fxquant.backends import backend
from fxquant.core.facts import BitAllocation, Settings
from fxquant.core.host import SILENT, Reporter, TimingCache, cache_folder, machine
from fxquant.core.ir import FLOAT, Program
from fxquant.core.run import CalibrationSet
from fxquant.flow.pipeline import run, simulate, widest_plan
from fxquant.passes import MeasureLatency

RUNTIMES = ("torch", "onnxruntime", "fxquant")
"""Packages whose versions decide what a layer takes."""


def measure_latency(
    program: Program, images: CalibrationSet, reporter: Reporter = SILENT, cache: TimingCache | None = None
) -> Program:
    """Add measured milliseconds per site, precision and border to the costs.

    Args:
        program: calibrated.
        images: the first of them is run.
        reporter: shows progress.
        cache: times of earlier runs; None takes those in the user's folder, `TimingCache(None)` none.
    """
    settings, widest = program[Settings], widest_plan(program).choices
    compile_graph = partial(backend(settings.target).compile, threads=settings.threads)

    def simulated(floats: frozenset[str]) -> GraphModule:
        choices = {name: FLOAT if name in floats else choice for name, choice in widest.items()}
        return simulate(program, BitAllocation(choices)).module

    if cache is None:
        belongs = {"target": settings.target, "threads": str(settings.threads)} | machine(RUNTIMES)
        cache = TimingCache(cache_folder(), belongs)
    step = MeasureLatency(
        simulated,
        images.slice(0, 1).inputs,
        compile_graph,
        settings.threads,
        cache,
        reporter,
        seed=settings.seed,
    )
    return run(program, step)
