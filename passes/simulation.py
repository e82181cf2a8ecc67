"""Simulation: the graph of a plan, with fake-quant nodes on its edges and weights.

A plan that keeps further sites in float has other edges than the program was calibrated with. They depend on the set
of those sites alone, so they are found once for each set and kept in the `PlanEdges` of the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fxquant.core.errors import OptionError
from fxquant.core.facts import BitAllocation, Settings, Target
from fxquant.core.ir import Choice, EdgeGroups, PlanEdges, Program, QuantizedEdges, Sites
from fxquant.passes.base import Pass
from fxquant.passes.find_edges import FindEdges
from fxquant.passes.find_sites import FindSites
from fxquant.passes.insert_fake_quant import InsertFakeQuant
from fxquant.passes.tie_edges import TieEdges


def site_passes(target: Target, settings: Settings, keep_float: Mapping[str, str]) -> tuple[Pass, ...]:
    """Return the passes that find edges, groups and sites.

    Args:
        target: what runs in integers.
        settings: the candidate precisions.
        keep_float: site name -> why it stays in float.
    """
    return (
        FindEdges(target, dict(keep_float)),
        TieEdges(),
        FindSites(
            target,
            settings.bits,
            settings.activation_bits,
            settings.pins,
            settings.pin_ends,
            settings.forbid,
            tuple(keep_float),
        ),
    )


def simulate(program: Program, plan: BitAllocation, round_biases: bool = True) -> Program:
    """Return the simulated graph of a plan: edges as the plan needs them, fake-quant on each.

    Args:
        program: calibrated; it is not changed.
        plan: a precision for every site.
        round_biases: put rounded weights and biases in, as kernels have them; False leaves the network with its
            quantizers off exactly float.

    Raises:
        OptionError: the plan lacks a site, names an unknown one, or a precision without a grid.
    """
    names = {site.name for site in program[Sites].sites}
    unknown = sorted(set(plan.choices) - names)
    if unknown:
        raise OptionError(f"the plan names sites the model does not have: {', '.join(unknown)}")
    floats = frozenset(name for name, choice in plan.choices.items() if choice.is_float)
    insert = InsertFakeQuant(max(program[Settings].activation_bits), round_biases)
    facts = _edges_without(program, floats) if floats else ()
    return insert(program.with_facts(*facts, plan))


def _edges_without(program: Program, floats: frozenset[str]) -> tuple[QuantizedEdges, EdgeGroups, Sites]:
    """Return edges, groups and sites where these sites are in float, too; found once for each set of them."""
    plans = program[PlanEdges]
    if floats not in plans.found:
        # Pins and forbidden precisions have been decided on; patterns might match nothing among fewer sites.
        settings = replace(program[Settings], pins={}, pin_ends=False, forbid={})
        searched = program
        keep_float = {**plans.kept, **dict.fromkeys(floats, "the plan keeps it in float")}
        for step in site_passes(program[Target], settings, keep_float):
            searched = step(searched)
        plans.found[floats] = searched[QuantizedEdges], searched[EdgeGroups], searched[Sites]
    return plans.found[floats]


def widest_plan(program: Program) -> BitAllocation:
    """Return the plan with every site at its widest integer precision, sites that read one value at a common width."""
    common: dict[str, set[int]] = {}
    for site in program[Sites].sites:
        widths = {choice.activation_bits for choice in site.choices if not choice.is_float}
        known = common.setdefault(site.input_tie, widths)
        common[site.input_tie] = known & widths if widths else known
    widest: dict[str, Choice] = {}
    for site in program[Sites].sites:
        width = max(common[site.input_tie], default=0)
        integers = [choice for choice in site.choices if not choice.is_float]
        agreeing = [choice for choice in integers if choice.activation_bits == width]
        widest[site.name] = (agreeing or integers or list(site.choices))[-1]
    return BitAllocation(widest)
