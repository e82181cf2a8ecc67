"""Measure milliseconds on this machine in the target's runtime, and add the `latency` table to the costs.

Each distinct layer is timed alone, in float and in integers; then whole networks: the float one, the one in integers,
and some in which stretches of sites are float. `passes.cost.latency` makes a model of them. What was measured before on
this machine, with these versions, is read back from disk.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.core.cost import CostTables, Noise
from fxquant.core.errors import OptionError
from fxquant.core.extract import cut_out
from fxquant.core.graphs import consumers, resolve
from fxquant.core.ops import rule_of, shape_of
from fxquant.core.program import Program
from fxquant.core.progress import SILENT, Reporter
from fxquant.core.spec import Site, Sites
from fxquant.core.store import text_digest
from fxquant.core.timing import Timing, time_runs, warn_if_busy
from fxquant.core.timing_cache import TimingCache
from fxquant.passes.base import Pass
from fxquant.passes.cost.hand_overs import hand_overs
from fxquant.passes.cost.latency import Observation, fit

Compile = Callable[[GraphModule, tuple[Tensor, ...]], Callable[[tuple[Tensor, ...]], Tensor]]
"""Makes a float or simulated graph run in the runtime that is measured."""
Simulate = Callable[[frozenset[str]], GraphModule]
"""Makes the network with these sites in float and all others at their widest integer precision."""

PLANS = 16
"""Whole networks that mix float and integers; with eight, plans of MobileNetV2 were predicted within 4 %."""
SHARES = (0.1, 0.3, 0.5, 0.8)
"""Shares of sites that are float in the networks where each site is drawn alone."""
TOGETHER = 0.5e9
"""Bytes of float weights that may be loaded at once, in all networks that are timed in turn."""


@dataclass(frozen=True)
class MeasureLatency(Pass):
    """Add the `latency` table to `CostTables`.

    Args:
        simulate: makes the network with some sites in float.
        inputs: one sample per input.
        compile: makes a graph run in the target's runtime.
        threads: threads of that runtime, None for its default; one thread is measured in CPU time.
        cache: what has been measured before.
        reporter: shows progress.
        plans: networks that mix float and integers, at least 0; none are measured where no site may be float.
        seed: of the choice of those.

    Raises:
        OptionError: a negative number of plans.
    """

    simulate: Simulate = field(repr=False)
    inputs: tuple[Tensor, ...] = field(repr=False)
    compile: Compile = field(repr=False)
    threads: int | None = None
    cache: TimingCache = field(default_factory=lambda: TimingCache(None), repr=False)
    reporter: Reporter = field(default=SILENT, repr=False)
    plans: int = PLANS
    seed: int = 0
    reads = (Sites, CostTables)
    writes = (CostTables,)

    def __post_init__(self) -> None:
        if self.plans < 0:
            raise OptionError(f"plans={self.plans} must be at least 0")

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its latencies."""
        sites, candidates = program[Sites].sites, program[Sites].candidates
        module, integer = program.module, self.simulate(frozenset())
        known: dict[str, list[Timing]] = {}
        alone: dict[str, tuple[float, float]] = {}
        for site in self.reporter.track(sites, "time each layer", len(sites)):
            key = signature(module, site)
            if key not in known:
                known[key] = self._timed(key, 2, partial(self._time_site, (module, integer), site))
            single, wide = (timing.milliseconds * len(site.nodes) for timing in known[key])
            alone[site.name] = single, wide
        mixed = [site.name for site in sites if any(choice.is_float for choice in site.choices)]
        every = frozenset(site.name for site in sites)
        plans = [every, frozenset[str](), *mixed_plans(mixed, self.plans if mixed else 0, self.seed)]
        graphs = text_digest(f"{module.graph} {integer.graph}")
        key = f"networks {graphs} {self._shapes} {[sorted(plan) for plan in plans]}"
        wholes = self._timed(key, len(plans), partial(self._time_wholes, module, plans))
        seen = [Observation(floats, timing.milliseconds) for floats, timing in zip(plans, wholes, strict=True)]
        model = fit(alone, hand_overs(module.graph, sites), seen)
        misses = [abs(model.predict(o.floats) / o.milliseconds - 1.0) for o in seen]
        noise = Noise.of([*wholes, *(t for pair in known.values() for t in pair)], sum(misses) / len(misses))
        table = replace(model.table(candidates), noise=noise)
        return program.with_facts(CostTables({**program[CostTables].tables, "latency": table})), 0

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for tensor in self.inputs]

    def _timed(self, key: str, count: int, measure: Callable[[], list[Timing]]) -> list[Timing]:
        found = self.cache.get(key, count)
        if found is None:
            found = measure()
            self.cache.put(key, found)
            if count > 2:
                # Said of whole networks, once: layers alone only set the prior.
                warn_if_busy(found)
        return found

    def _time_site(self, sources: tuple[GraphModule, GraphModule], site: Site) -> list[Timing]:
        """Return the timings in float and in integers of one of the site's ops."""
        runs = []
        for source in sources:
            cut, shape = cut_out(source, resolve(source.graph, site.nodes[0]))
            example = (torch.rand(shape),)
            runs.append(partial(self.compile(cut, example), example))
        return time_runs(runs, self.threads)

    def _time_wholes(self, module: GraphModule, plans: Sequence[frozenset[str]]) -> list[Timing]:
        """Return the timings of networks, in batches that fit into memory, each beside the two without borders."""
        ends = [self.compile(module, self.inputs), self.compile(self.simulate(frozenset()), self.inputs)]
        weights = sum(tensor.numel() * 4 for tensor in module.state_dict().values())
        size = max(2, int(TOGETHER / max(1, weights)) - len(ends))
        timings: list[Timing] = []
        starts = range(2, max(3, len(plans)), size)
        for start in self.reporter.track(starts, "time whole networks", len(starts)):
            batch = [self.compile(self.simulate(plan), self.inputs) for plan in plans[start : start + size]]
            found = time_runs([partial(run, self.inputs) for run in (*ends, *batch)], self.threads)
            timings += found if not timings else _rescaled(found, timings)
        return timings


def _rescaled(found: Sequence[Timing], first: Sequence[Timing]) -> list[Timing]:
    """Return the timings behind the first two, in the time of the first batch: machines change pace between batches."""
    ratio = math.sqrt(math.prod(first[k].milliseconds / found[k].milliseconds for k in range(2)))
    return [Timing(t.milliseconds * ratio, t.spread, t.outliers, t.waiting) for t in found[2:]]


def mixed_plans(names: Sequence[str], count: int, seed: int) -> list[frozenset[str]]:
    """Return sets of sites to measure in float: by turns stretches of neighbours and sites drawn one by one.

    Stretches show what an island costs where borders are few, single sites separate one border from the next.

    Args:
        names: sites that may be float, in the order of the network.
        count: plans, fewer where there are not as many that mix.
        seed: of the choice.
    """
    draw, found = random.Random(seed), dict[frozenset[str], None]()
    for attempt in range(20 * count):
        if len(found) == count:
            break
        plan = _stretches(names, draw) if attempt % 2 else _drawn(names, draw)
        if 0 < len(plan) < len(names):
            found[plan] = None
    return list(found)


def _stretches(names: Sequence[str], draw: random.Random) -> frozenset[str]:
    cuts = sorted(draw.sample(range(1, len(names)), min(draw.randint(1, 6), len(names) - 1)))
    ends = zip([0, *cuts], [*cuts, len(names)], strict=True)
    parity = draw.randint(0, 1)
    return frozenset(name for k, (start, end) in enumerate(ends) if k % 2 == parity for name in names[start:end])


def _drawn(names: Sequence[str], draw: random.Random) -> frozenset[str]:
    share = draw.choice(SHARES)
    return frozenset(name for name in names if draw.random() < share)


def signature(module: GraphModule, site: Site) -> str:
    """Return what the time of a site depends on: op, shapes, settings, clip; equal sites are measured once."""
    node = resolve(module.graph, site.nodes[0])
    settings = [str(argument) for argument in node.args if not isinstance(argument, Node)]
    readers = [rule.kind for rule in map(rule_of, consumers(node)) if rule is not None]
    return f"layer {node.target} {shape_of(node.args[0])[1:]} {shape_of(node.args[1])} {settings} {readers[:1]}"
