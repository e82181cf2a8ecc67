"""`latency`: milliseconds per site and precision, measured on this machine in the target's runtime.

Each site's op is cut out of the network with its quantizers and timed alone, in float and in integers, interleaved,
median of several. An op alone pays for conversions that a network fuses away and leaves out what a network adds, so the
two networks that can be measured whole are shared out by those times: `t_l(float) = T_float tau_l / sum tau`, and the
same for integers with every site at its widest precision. Both whole networks are then met exactly; a plan that mixes
float and integers also pays for its borders, which the table does not know: measure it before you trust it. Precisions
that run on the same kernel cost the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.core.cost import CostTable, CostTables
from fxquant.core.extract import cut_out
from fxquant.core.graphs import consumers, resolve
from fxquant.core.ops import rule_of, shape_of
from fxquant.core.program import Program
from fxquant.core.progress import SILENT, Reporter
from fxquant.core.spec import Site, Sites
from fxquant.core.timing import time_interleaved
from fxquant.passes.base import Pass

Compile = Callable[[GraphModule, tuple[Tensor, ...]], Callable[[tuple[Tensor, ...]], Tensor]]
"""Makes a float or simulated graph run in the runtime that is measured."""


@dataclass(frozen=True)
class MeasureLatency(Pass):
    """Add the `latency` table to `CostTables`.

    Args:
        simulated: the network with every site at its widest integer precision.
        inputs: one sample per input.
        compile: makes a graph run in the target's runtime.
        reporter: shows progress.
    """

    simulated: GraphModule = field(repr=False)
    inputs: tuple[Tensor, ...] = field(repr=False)
    compile: Compile = field(repr=False)
    reporter: Reporter = field(default=SILENT, repr=False)
    reads = (Sites, CostTables)
    writes = (CostTables,)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its latencies."""
        sites, candidates = program[Sites].sites, program[Sites].candidates
        known: dict[tuple[object, ...], list[float]] = {}
        alone: dict[str, list[float]] = {}
        for site in self.reporter.track(sites, "time each layer", len(sites)):
            key = _signature(program.module, site)
            if key not in known:
                known[key] = self._time_site(program.module, site)
            alone[site.name] = [milliseconds * len(site.nodes) for milliseconds in known[key]]
        whole = [self.compile(graph, self.inputs) for graph in (program.module, self.simulated)]
        float_ms, integer_ms = time_interleaved([partial(run, self.inputs) for run in whole])
        floats, integers = (
            shared_out(whole_ms, {name: times[k] for name, times in alone.items()})
            for k, whole_ms in enumerate((float_ms, integer_ms))
        )
        values = np.array([(floats if c.choice.is_float else integers)[c.site] for c in candidates])
        table = CostTable(candidates, values, 0.0, float_ms, "milliseconds")
        return program.with_facts(CostTables({**program[CostTables].tables, "latency": table})), 0

    def _time_site(self, module: GraphModule, site: Site) -> list[float]:
        """Return (float, integer) milliseconds of one of the site's ops on one sample."""
        runs = []
        for source in (module, self.simulated):
            cut, shape = cut_out(source, resolve(source.graph, site.nodes[0]))
            example = (torch.rand(shape),)
            runs.append(partial(self.compile(cut, example), example))
        return time_interleaved(runs)


def shared_out(whole: float, alone: Mapping[str, float]) -> dict[str, float]:
    """Return each site's share of a whole network's milliseconds, in proportion to its time alone."""
    total = sum(alone.values())
    return {name: whole * milliseconds / total for name, milliseconds in alone.items()}


def _signature(module: GraphModule, site: Site) -> tuple[object, ...]:
    """Return what the time of a site depends on: op, shapes, settings, clip; equal sites are measured once."""
    node = resolve(module.graph, site.nodes[0])
    settings = tuple(str(argument) for argument in node.args if not isinstance(argument, Node))
    readers = [rule.kind for rule in map(rule_of, consumers(node)) if rule is not None]
    return (str(node.target), shape_of(node.args[0])[1:], shape_of(node.args[1]), settings, tuple(readers[:1]))
