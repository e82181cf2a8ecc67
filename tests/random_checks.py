"""What must hold of any network: each property as a function that a random graph, or one found by them, is given to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from fxquant import flow
from fxquant.api import lower
from fxquant.backends import backend, to_qdq
from fxquant.backends.exact import run_traced
from fxquant.backends.int8 import FxInt8Backend
from fxquant.capture import capture
from fxquant.core.errors import InfeasibleBudgetError
from fxquant.core.facts import BitAllocation, Budget, CostTables, SensitivityMatrix, Settings, Surrogates, agrees, fits
from fxquant.core.ir import Choice, Program, QuantizedEdges, Sites, rule_of
from fxquant.core.run import CalibrationSet
from fxquant.parity import compare
from fxquant.passes import AllocateBits, simulate
from fxquant.result import Result
from tests.random_graphs import Recipe, images, network

TARGETS = ("onnxruntime", "fx_int8", "reference", "simulation")
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 32)
BY_HAND = 3000
"""Plans at most that are tried one by one."""


def alike(answer: Any, expected: Any, tolerance: float | None = None) -> None:
    """Require one structure, the same shapes and types, and with a tolerance the same values."""
    (mine, own), (theirs, other) = tree_flatten(answer), tree_flatten(expected)
    assert own == other
    for one, two in zip(mine, theirs, strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        if tolerance is not None:
            torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def prepared(recipe: Recipe, target: str) -> Program:
    """Return the calibrated program; capturing and preparing it change neither the model nor its answers."""
    model, shown = network(recipe), images(recipe, 5, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibration = CalibrationSet(images(recipe, 12))
    known = backend(target).target.activation_bits
    settings = Settings(bits=WIDTHS, activation_bits=tuple(b for b in (2, 4, 5, 8) if b in known), target=target)
    program = capture(model, calibration.slice(0, 2).inputs)
    with torch.no_grad():
        expected = model(*shown)
        alike(program.module(*shown), expected, 1e-4)
        program = flow.prepare(program, settings)
        # Batch norms are folded, so that sums are formed in another order.
        alike(program.module(*shown), expected, 1e-3)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(part.training for part in model.modules())
    named = set(program[QuantizedEdges].integer_nodes) | set(program[Sites].refusals)
    for node in program.module.graph.nodes:
        rule = rule_of(node)
        assert rule is None or rule.macs is None or node.name in named, f"no reason why {node.name} is in float"
    return flow.calibrate(program, calibration)


def random_plan(program: Program, chance: Random) -> BitAllocation:
    """Return a plan that takes any legal width at each site; sites that read one value agree on its width."""
    widths: dict[str, int] = {}
    choices: dict[str, Choice] = {}
    for site in program[Sites].sites:
        known = sorted({choice.activation_bits for choice in site.choices if not choice.is_float}, reverse=True)
        width = widths.setdefault(site.input_tie, known[chance.randrange(len(known))])
        legal = [choice for choice in site.choices if choice.is_float or choice.activation_bits == width]
        choices[site.name] = legal[-1 - chance.randrange(len(legal))]
    assert agrees(program[Sites].sites, choices)
    return BitAllocation(choices)


def simulated(program: Program, plan: BitAllocation) -> GraphModule:
    """Return the simulated graph of a plan."""
    return simulate(program, plan).module


def is_what_the_reference_computes(module: GraphModule, recipe: Recipe) -> None:
    """Require the explicit integer graph to make the simulation's integers, to a step, from the same integers."""
    shown = images(recipe, 5, seed=1)
    traced = run_traced(module, shown)
    held = run_traced(to_qdq(module), shown, traced.edges)
    assert set(held.edges) == set(traced.edges)
    for name, integers in traced.edges.items():
        apart = (held.edges[name].int() - integers.int()).abs()
        assert not apart.numel() or int(apart.max()) <= 1, f"edge {name} is {int(apart.max())} steps off"
    for one, other in zip((held.output, *held.others), (traced.output, *traced.others), strict=True):
        alike(one, other, 1e-3)


def runs_everywhere(module: GraphModule, recipe: Recipe) -> None:
    """Require both runtimes to compute the plan edge by edge, and the lowered graph to answer as the model does."""
    shown = images(recipe, 5, seed=1)
    with torch.no_grad():
        alike(FxInt8Backend().lower(module)(*shown), network(recipe)(*shown))
    found = compare(module, CalibrationSet(shown), ("onnxruntime", "fx_int8"), threads=1)
    assert found.within, found.summary()


def scored(program: Program, seed: int) -> Program:
    """Return the program with made-up scores: narrow widths hurt, and some pairs of layers hurt together."""
    candidates = program[Sites].candidates
    draw = np.random.default_rng(seed)
    hurt = np.array([1.0 / (c.choice.weight_bits * c.choice.activation_bits) for c in candidates])
    factor = draw.normal(size=(len(candidates), 3)) * hurt[:, None]
    other = np.array([[a.site != b.site for b in candidates] for a in candidates])
    values = np.diag(hurt) + (factor @ factor.T) * other
    matrix = SensitivityMatrix(candidates, (values + values.T) / 2, np.zeros_like(values), "gram", 1.0, "KL nats")
    return program.with_facts(matrix, Surrogates({"gram": matrix}))


LIMITS = ("average_bits", "size_ratio", "bops_ratio", "size_mb", "activation_mb")


def random_budget(program: Program, chance: Random) -> Budget:
    """Return one or two limits, a little beyond what can be reached on either side."""
    tables, sites = program[CostTables], program[Sites]
    limits: dict[str, Any] = {}
    for name in {LIMITS[chance.randrange(len(LIMITS))] for _ in range(chance.randrange(1, 3))}:
        ends = [cost_by_hand(program, plan)[name] for plan in (extreme(sites, 0), extreme(sites, -1))]
        share = chance.randrange(-20, 121) / 100
        limits[name] = max(ends[0] + share * (ends[1] - ends[0]), ends[0] * 0.5)
    assert tables.tables
    return Budget(**limits)


def extreme(sites: Sites, end: int) -> dict[str, Choice]:
    """Return the plan that takes each site's first choice, or its last."""
    return {site.name: site.choices[end] for site in sites.sites}


def cost_by_hand(program: Program, choices: Mapping[str, Choice]) -> dict[str, float]:
    """Return what a plan costs; but for bytes of activations, worked out from the definitions in README.md."""
    sites, tables = program[Sites].sites, program[CostTables]
    weights = sum(site.weight_count for site in sites)
    size = tables["size"].of(choices)
    operations = sum(s.macs * choices[s.name].weight_bits * choices[s.name].activation_bits for s in sites)
    return {
        "average_bits": sum(s.weight_count * choices[s.name].weight_bits for s in sites) / weights,
        "bops_ratio": operations / (sum(site.macs for site in sites) * 1024),
        "size_mb": size / 1e6,
        "size_ratio": size / tables["size"].float_cost,
        "activation_mb": tables["activation"].of(choices) / 1e6,
    }


def keeps_the_budget_or_refuses(program: Program, budget: Budget, solver: str = "iqp") -> None:
    """Require a plan within the limits by costs worked out again, or an error that names what can be reached.

    An error is held against every plan there is, where there are not too many.
    """
    sites, limits = program[Sites].sites, budget.limits
    try:
        plan = flow.run(program, AllocateBits(budget, solver, time_limit=20.0))[BitAllocation]
    except InfeasibleBudgetError as error:
        _is_out_of_reach(program, limits, str(error))
        return
    used = cost_by_hand(program, plan.choices)
    for name, limit in limits.items():
        assert used[name] <= limit * (1 + 1e-6), f"{name}: {used[name]} of {limit}"
        assert plan.used[name] == pytest.approx(used[name], rel=1e-6)
    assert agrees(sites, plan.choices)
    assert set(plan.choices) == {site.name for site in sites}


def _is_out_of_reach(program: Program, limits: Mapping[str, float], message: str) -> None:
    sites = program[Sites].sites
    assert all(f"{name}=" in message for name in limits)
    assert message.count("reachable: ") == len(limits)
    if np.prod([float(len(site.choices)) for site in sites]) > BY_HAND:
        return
    names = [site.name for site in sites]
    for row in itertools.product(*(site.choices for site in sites)):
        choices = dict(zip(names, row, strict=True))
        kept = agrees(sites, choices) and fits(choices, limits, program[CostTables])
        assert not kept, f"refused, but {choices} keeps {limits}"


def reads_back_as_it_was(program: Program, plan: BitAllocation, recipe: Recipe, folder: Path) -> None:
    """Require a saved result to answer to the bit as before, simulated and in integers."""
    shown = images(recipe, 5, seed=1)
    made = Result(flow.impose(program, plan), CalibrationSet(images(recipe, 4)))
    read = Result.load(made.save(folder))
    assert read.allocation.choices == plan.choices
    with torch.no_grad():
        for one, other in ((made.simulated, read.simulated), (lower(made, "fx_int8"), lower(read, "fx_int8"))):
            alike(other(*shown), one(*shown), 0.0)
