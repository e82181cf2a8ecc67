"""Simulated graphs for the runtimes, made once per test run."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.backends import backend
from fxquant.core.facts import BitAllocation, Target
from fxquant.core.ir import Choice, FakeQuantize, Program, Sites
from fxquant.core.run import CalibrationSet
from fxquant.passes import (
    Calibrate,
    CollectRanges,
    FindEdges,
    FindSites,
    InsertFakeQuant,
    InsertObservers,
    ScaleWeights,
    TieEdges,
)
from tests.models import MODELS
from tests.programs import folded

WIDTHS = tuple(range(2, 9))
TARGET = backend("onnxruntime").target
QUANTIZED = sorted(set(MODELS) - {"weightless"})


def calibrated(
    program: Program,
    inputs: tuple[Tensor, ...],
    keep_float: tuple[str, ...] = (),
    widths: tuple[int | str, ...] = WIDTHS,
    target: Target = TARGET,
    activation_bits: int = 8,
) -> Program:
    """Return a program for a target with all facts a plan of these widths needs."""
    program = TieEdges()(FindEdges(target, dict.fromkeys(keep_float, "asked"))(program))
    program = FindSites(target, bits=widths, activation_bits=(activation_bits,))(program)
    observed = Calibrate(CalibrationSet(inputs))(InsertObservers("minmax")(program))
    return ScaleWeights()(CollectRanges()(observed))


def plan_of(program: Program, widths: tuple[int, ...], activation_bits: int = 8) -> GraphModule:
    """Return the simulated graph, its sites taking the widths in turn."""
    choices = {s.name: Choice(widths[i % len(widths)], activation_bits) for i, s in enumerate(program[Sites].sites)}
    return InsertFakeQuant(activation_bits)(program.with_facts(BitAllocation(choices))).module


@cache
def ready(name: str) -> Program:
    """Return a calibrated program of a network of `tests.models`."""
    return calibrated(folded(name), MODELS[name].inputs(8))


@cache
def simulated(name: str, widths: tuple[int, ...] = (8,)) -> GraphModule:
    """Return the simulated graph of a network of `tests.models`."""
    return plan_of(ready(name), widths)


def quantizers(module: GraphModule) -> Iterable[tuple[str, FakeQuantize]]:
    """Return the quantizers of a simulated graph with the names of their nodes."""
    return [(name, m) for name, m in module.named_modules() if isinstance(m, FakeQuantize)]


def error_in_steps(answer: Tensor, expected: Tensor) -> Tensor:
    """Return `|answer - expected|` in units of 1/255 of the expected range: the grid an output quantizer would have."""
    return (answer - expected).abs() / ((expected.max() - expected.min()) / 255).clamp(min=1e-12)


def example(name: str, count: int) -> tuple[Tensor, ...]:
    """Return inputs of a network that calibration has not seen."""
    torch.manual_seed(count)
    inputs = MODELS[name].inputs(count + 100)
    return tuple(t[-count:] for t in inputs)
