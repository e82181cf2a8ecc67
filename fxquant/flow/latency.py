"""Measure milliseconds on this machine, as a cost like any other."""

from __future__ import annotations

from functools import partial

from fxquant.backends import backend
from fxquant.core.facts import Settings, Target
from fxquant.core.host import SILENT, Reporter, TimingCache, cache_folder, machine
from fxquant.core.ir import Program
from fxquant.core.run import CalibrationSet
from fxquant.passes import MeasureLatency

PACKAGES = ("torch", "fxquant")
"""Packages whose versions decide what a layer takes, in addition to those of the backend."""


def measure_latency(
    program: Program, images: CalibrationSet, reporter: Reporter = SILENT, cache: TimingCache | None = None
) -> Program:
    """Add measured milliseconds per site, precision and border to the costs.

    Args:
        program: calibrated.
        images: the first of them is run.
        reporter: shows progress.
        cache: times of earlier runs; None uses those in the user's folder, `TimingCache(None)` none.
    """
    settings, runtime = program[Settings], backend(program[Target])
    compile_graph = partial(runtime.compile, threads=settings.threads)
    if cache is None:
        belongs = {"target": runtime.target.runner, "threads": str(settings.threads)}
        belongs |= machine((*PACKAGES, *runtime.packages.modules))
        cache = TimingCache(cache_folder(), belongs)
    step = MeasureLatency(
        images.slice(0, 1).inputs, compile_graph, settings.threads, cache, reporter, seed=settings.seed
    )
    return step(program)
