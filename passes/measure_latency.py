"""Measure milliseconds on this machine in the target's runtime, and add the `latency` table to the costs.

Each distinct layer is timed alone, in float and in integers; then whole networks: the float one, the integer one, and
some that mix both. `passes.cost` fits a model to them. The best plan by a model exploits the model's errors, so further
networks that the model predicts to be fast are measured, and the model is fitted again. Measurements on this machine
with these versions are cached on disk.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.core.errors import OptionError, SolverError
from fxquant.core.facts import BitAllocation, CostTables, Noise, Settings
from fxquant.core.host import SILENT, Reporter, Timing, TimingCache, time_runs, warn_if_busy
from fxquant.core.ir import FLOAT, Candidate, Choice, Program, Site, Sites, consumers, resolve, rule_of, shape_of
from fxquant.core.run import cut_out
from fxquant.core.storage import text_digest
from fxquant.passes.allocation import SOLVERS
from fxquant.passes.base import Pass
from fxquant.passes.cost import LatencyModel, Observation, SiteLink, fit_latency, site_links
from fxquant.passes.simulation import simulate, widest_plan

Compile = Callable[[GraphModule, tuple[Tensor, ...]], Callable[[tuple[Tensor, ...]], Tensor]]
"""Makes a float or simulated graph run in the runtime that is measured."""

PLANS, CHOSEN = 12, 8
"""Whole networks that mix float and integers: drawn at random, and chosen by a first model as a solver would."""
CHOSEN_RATIOS = (0.3, 0.95)
"""Latency limits of the chosen ones, as shares of the way from all integers to all float."""
SHARES = (0.1, 0.3, 0.5, 0.8)
"""Shares of float sites in the networks whose sites are drawn independently."""
DRAWS = 20
"""Plans drawn for each one that is measured."""
TOGETHER = 0.5e9
"""Bytes of float weights loaded at once, over all networks that are timed in turn."""


@dataclass(frozen=True)
class MeasureLatency(Pass):
    """Add the `latency` table to `CostTables`.

    Args:
        inputs: one sample per input.
        compile: compiles a graph for the target's runtime.
        threads: threads of that runtime, None for its default; one thread is measured in CPU time.
        cache: earlier measurements.
        reporter: shows progress.
        plans: networks that mix float and integers, at least 0; none are measured where no site may be float.
        chosen: further ones that a model of the former predicts to be fast, at least 0.
        seed: of the draws.

    Raises:
        OptionError: a negative number of plans.
    """

    inputs: tuple[Tensor, ...] = field(repr=False)
    compile: Compile = field(repr=False)
    threads: int | None = None
    cache: TimingCache = field(default_factory=lambda: TimingCache(None), repr=False)
    reporter: Reporter = field(default=SILENT, repr=False)
    plans: int = PLANS
    chosen: int = CHOSEN
    seed: int = 0
    reads = (Sites, CostTables, Settings)
    writes = (CostTables,)

    def __post_init__(self) -> None:
        if self.plans < 0 or self.chosen < 0:
            raise OptionError(f"plans={self.plans} and chosen={self.chosen} must be at least 0")

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its latencies."""
        # A weight that is only stored is multiplied in float whatever its format.
        sites, candidates = [s for s in program[Sites].sites if not s.stored], program[Sites].candidates
        module, integer = program.module, _mixed(program, frozenset())
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
        places = site_links(module.graph, sites)
        plans = [every, frozenset[str](), *mixed_plans(mixed, self.plans if mixed else 0, self.seed, places)]
        shapes = [tuple(tensor.shape) for tensor in self.inputs]
        graphs = text_digest(f"{module.graph} {integer.graph}")

        def observed(plans: Sequence[frozenset[str]]) -> list[Timing]:
            key = f"networks {graphs} {shapes} {[sorted(plan) for plan in plans]}"
            return self._timed(key, len(plans), partial(self._time_wholes, program, plans))

        wholes = observed(plans)
        model = fit_latency(alone, places, _observations(plans, wholes))
        further = [plan for plan in chosen_plans(model, mixed, self.chosen, self.seed) if plan not in plans]
        if further:
            plans += further
            wholes += _at_first_pace(observed([*plans[:2], *further]), wholes)
            model = fit_latency(alone, places, _observations(plans, wholes))
        seen = _observations(plans, wholes)
        misses = [abs(model.predict(o.floats) / o.milliseconds - 1.0) for o in seen]
        noise = Noise.of([*wholes, *(t for pair in known.values() for t in pair)], sum(misses) / len(misses))
        table = replace(model.table(candidates), noise=noise)
        return program.with_facts(CostTables({**program[CostTables].tables, "latency": table})), 0

    def _timed(self, key: str, count: int, measure: Callable[[], list[Timing]]) -> list[Timing]:
        found = self.cache.get(key, count)
        if found is None:
            found = measure()
            self.cache.put(key, found)
            if count > 2:
                # Whole networks decide; times of single layers only set the prior.
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

    def _time_wholes(self, program: Program, plans: Sequence[frozenset[str]]) -> list[Timing]:
        """Return the timings of networks, in batches that fit into memory; each batch times the first two again."""
        ends = [self.compile(program.module, self.inputs), self.compile(_mixed(program, frozenset()), self.inputs)]
        weights = sum(tensor.numel() * 4 for tensor in program.module.state_dict().values())
        size = max(2, int(TOGETHER / max(1, weights)) - len(ends))
        timings: list[Timing] = []
        starts = range(2, max(3, len(plans)), size)
        for start in self.reporter.track(starts, "time whole networks", len(starts)):
            batch = [self.compile(_mixed(program, plan), self.inputs) for plan in plans[start : start + size]]
            found = time_runs([partial(run, self.inputs) for run in (*ends, *batch)], self.threads)
            timings += found if not timings else _at_first_pace(found, timings)
        return timings


def _mixed(program: Program, floats: frozenset[str]) -> GraphModule:
    """Return the network with these sites in float and all others at their widest integer precision."""
    choices = {name: FLOAT if name in floats else choice for name, choice in widest_plan(program).choices.items()}
    return simulate(program, BitAllocation(choices)).module


def _observations(plans: Sequence[frozenset[str]], timings: Sequence[Timing]) -> list[Observation]:
    return [Observation(floats, timing.milliseconds) for floats, timing in zip(plans, timings, strict=True)]


def _at_first_pace(found: Sequence[Timing], first: Sequence[Timing]) -> list[Timing]:
    """Return the timings after the first two, at the pace of the first batch: machines change pace between batches."""
    ratio = math.sqrt(math.prod(first[k].milliseconds / found[k].milliseconds for k in range(2)))
    return [Timing(t.milliseconds * ratio, t.spread, t.outliers, t.waiting) for t in found[2:]]


def mixed_plans(names: Sequence[str], count: int, seed: int, places: Sequence[SiteLink] = ()) -> list[frozenset[str]]:
    """Return sets of sites to measure in float: by turns stretches of neighbours and independently drawn sites.

    Stretches have few borders, and show the cost of a float island; independent sites tell neighbouring borders apart.
    Each plan is the most informative of `DRAWS`: a border counts by the number of its values, and a quarter, a ninth,
    ... of that after it was seen once, twice, ... in the same direction.

    Args:
        names: sites that may be float, in the order of the network.
        count: plans; fewer if there are not as many.
        seed: of the draws.
        places: borders to cover; without any, the first draw is taken.
    """
    draw, found, seen = random.Random(seed), dict[frozenset[str], None](), Counter[tuple[SiteLink, bool]]()
    for attempt in range(20 * count):
        if len(found) == count:
            break
        make = _stretches if attempt % 2 else _drawn
        trials = [make(names, draw) for _ in range(DRAWS if places else 1)]
        plan = max(trials, key=lambda trial: _gain(trial, places, seen))
        if 0 < len(plan) < len(names) and plan not in found:
            found[plan] = None
            seen.update((place, place.one in plan) for place in places if _is_border(place, plan))
    return list(found)


def _is_border(place: SiteLink, floats: frozenset[str]) -> bool:
    return (place.one in floats) != (place.other in floats)


def _gain(floats: frozenset[str], places: Sequence[SiteLink], seen: Mapping[tuple[SiteLink, bool], int]) -> float:
    """Return how informative a plan is: the values on its borders, less for those seen before."""
    borders = [place for place in places if _is_border(place, floats)]
    return sum((place.elements + place.pooled) / (1 + seen[place, place.one in floats]) ** 2 for place in borders)


def _stretches(names: Sequence[str], draw: random.Random) -> frozenset[str]:
    cuts = sorted(draw.sample(range(1, len(names)), min(draw.randint(1, 6), len(names) - 1)))
    ends = zip([0, *cuts], [*cuts, len(names)], strict=True)
    parity = draw.randint(0, 1)
    return frozenset(name for k, (start, end) in enumerate(ends) if k % 2 == parity for name in names[start:end])


def _drawn(names: Sequence[str], draw: random.Random) -> frozenset[str]:
    share = draw.choice(SHARES)
    return frozenset(name for name in names if draw.random() < share)


def chosen_plans(model: LatencyModel, names: Sequence[str], count: int, seed: int) -> list[frozenset[str]]:
    """Return sets of float sites as a solver would choose them: valuable, and fast by the model.

    Args:
        model: predicts milliseconds.
        names: sites that may be float; all others run in integers.
        count: plans at most, each for random gains and a random limit.
        seed: of the draws.
    """
    if len(names) < 2:
        return []
    draw, found = np.random.default_rng(seed), dict[frozenset[str], None]()
    pair = (Choice(8, 8), FLOAT)
    candidates = tuple(Candidate(name, choice) for name in model.floats for choice in pair)
    table = model.table(candidates)
    ends = [table.of(dict.fromkeys(model.floats, choice)) for choice in pair]
    fixed = np.array([c.choice.is_float and c.site not in names for c in candidates], dtype=np.float64)
    for share in np.linspace(*CHOSEN_RATIOS, count):
        gains = draw.lognormal(size=len(model.floats)) * np.array(list(model.floats.values()))
        losses = np.array([[gain, 0.0] for gain in gains]).ravel()
        room = ends[0] + share * (ends[1] - ends[0]) - table.constant
        if room <= 0.0:
            continue
        groups = [np.array([2 * k, 2 * k + 1]) for k in range(len(gains))]
        products = {} if table.products is None else {0: table.products / room}
        costs = np.stack([table.values / room, fixed])
        try:
            solution = SOLVERS["greedy"](np.diag(losses), groups, costs, [1.0, 0.0], seed=seed, products=products)
        except SolverError:
            # If float is as fast as integers, no plan may be within the limit.
            continue
        plan = frozenset(
            c.site for c, taken in zip(candidates, solution.choice, strict=True) if taken and c.choice.is_float
        )
        if 0 < len(plan) < len(model.floats):
            found[plan] = None
    return list(found)


def signature(module: GraphModule, site: Site) -> str:
    """Return a key of what the time of a site depends on: op, shapes, settings, clip; equal sites are measured once."""
    node = resolve(module.graph, site.nodes[0])
    settings = [str(argument) for argument in node.args if not isinstance(argument, Node)]
    readers = [rule.kind for rule in map(rule_of, consumers(node)) if rule is not None]
    return f"layer {node.target} {shape_of(node.args[0])[1:]} {shape_of(node.args[1])} {settings} {readers[:1]}"
