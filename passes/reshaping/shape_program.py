"""Formats and ratios of all layers as one integer program, with the real cost of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxquant.core.errors import InfeasibleBudgetError
from fxquant.core.facts import LIMIT_TABLES, CostTables, Target, unit_of
from fxquant.core.ir import Program, Sites
from fxquant.passes.allocation import SOLVERS
from fxquant.passes.cost.size import FLOAT_BYTES, stored_bits
from fxquant.passes.reshaping.layer_inputs import Pair
from fxquant.passes.reshaping.variants import Variant

INDEX_BYTES = 8
"""Bytes of the place of a channel that is read twice."""


@dataclass(frozen=True)
class Chosen:
    """What a program chose.

    Args:
        variants: site -> its variant.
        predicted: sum of the losses of all variants alone.
        used: limit -> what they cost, in the limit's unit.
        restated: limit -> its value for the changed network: ratios and averages are against that one's own.
    """

    variants: Mapping[str, Variant]
    predicted: float
    used: Mapping[str, float]
    restated: Mapping[str, float]


def chosen_shapes(
    program: Program,
    variants: Sequence[Variant],
    losses: Sequence[float],
    pairs: Sequence[Pair],
    limits: Mapping[str, float],
    solver: str = "linear",
    time_limit: float = 60.0,
    seed: int = 0,
) -> Chosen:
    """Return the variants of least summed loss within limits.

    `min sum_i loss_i x_i` over one variant for each layer. A producer whose consumer leaves channels out costs only the
    outputs that are left: `cost = sum_i a_i x_i + sum_ij x_i b_i (n_j / N) x_j`, i a variant of the producer, j one of
    its consumer with n_j of N channels.

    Args:
        program: float network with its sites and costs.
        variants: of every site.
        losses: measured loss of each variant alone.
        pairs: producers and consumers of channels that may be left out.
        limits: limit -> value, of average_bits, size_mb, size_ratio, bops, bops_ratio.
        solver: name in `SOLVERS`.
        time_limit: seconds.
        seed: of the solver.

    Raises:
        InfeasibleBudgetError: no variants keep the limits.
    """
    tables, names = program[CostTables], [site.name for site in program[Sites].sites]
    groups = [[i for i, each in enumerate(variants) if each.site == name] for name in names]
    makers = {pair.producer: pair.consumer for pair in pairs}
    left = np.array([1 - len(each.dropped) / each.inputs for each in variants])
    rows, products = list[NDArray[np.float64]](), dict[int, NDArray[np.float64]]()
    for row, name in enumerate(limits):
        alone, shared = _costs(program, variants, name, makers)
        crossing = np.zeros((len(variants),) * 2)
        for maker, reader in makers.items():
            ours, theirs = (groups[names.index(site)] for site in (maker, reader))
            crossing[np.ix_(ours, theirs)] = np.outer(shared[ours], left[theirs]) / 2
        products[row] = crossing + crossing.T
        rows.append(alone)
    free = {name: limit - _constant(tables, name) for name, limit in limits.items()}
    solution = SOLVERS[solver](
        np.diag(np.asarray(losses, dtype=np.float64)),
        [np.array(group) for group in groups],
        np.stack(rows),
        np.array(list(free.values())),
        time_limit=time_limit,
        seed=seed,
        products=products,
    )
    if solution.status == "infeasible":
        asked = ", ".join(f"{name}={limit:g}" for name, limit in limits.items())
        raise InfeasibleBudgetError(f"no formats and ratios keep {asked}; raise the limit or allow narrower bits")
    picked = [int(i) for i in np.flatnonzero(solution.choice)]
    used, restated = dict[str, float](), dict[str, float]()
    for row, name in enumerate(limits):
        used[name] = float(rows[row][picked].sum() + products[row][np.ix_(picked, picked)].sum())
        used[name] += _constant(tables, name)
        restated[name] = limits[name] * _shrunk(program, [variants[i] for i in picked], makers, name)
    chosen = {variants[i].site: variants[i] for i in picked}
    return Chosen(chosen, float(np.asarray(losses)[picked].sum()), used, restated)


def _constant(tables: CostTables, name: str) -> float:
    """Return what no choice changes, in the limit's unit."""
    return tables[LIMIT_TABLES[name][0]].constant / unit_of(name, tables)


def _costs(
    program: Program, variants: Sequence[Variant], name: str, makers: Mapping[str, str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what variants cost alone, and the part that shrinks with the channels that a consumer leaves out."""
    tables, target, sites = program[CostTables], program[Target], program[Sites]
    table, unit = tables[LIMIT_TABLES[name][0]], unit_of(name, tables)
    values = {(c.site, c.choice): value for c, value in zip(table.candidates, table.values.tolist(), strict=True)}
    alone, shared = np.zeros(len(variants)), np.zeros(len(variants))
    for i, each in enumerate(variants):
        value, beside = values[each.site, each.choice], 0.0
        if table.unit == "bytes":
            # Scales and biases count whole, as if every output stayed.
            weights = stored_bits(sites.by_name(each.site), each.choice, target) / 8
            value, beside = weights, value - weights + INDEX_BYTES * len(each.split)
        whole = value * each.factor / unit
        shared[i] = whole if each.site in makers else 0.0
        alone[i] = beside / unit + whole - shared[i]
    return alone, shared


def _shrunk(program: Program, chosen: Sequence[Variant], makers: Mapping[str, str], name: str) -> float:
    """Return a limit's factor for the changed network: 1 for absolute limits; else old yardstick over new."""
    left = {each.site: 1 - len(each.dropped) / each.inputs for each in chosen}
    factors = {each.site: each.factor * left.get(makers.get(each.site, ""), 1.0) for each in chosen}
    sites = {site.name: site for site in program[Sites].sites}
    kind, which = LIMIT_TABLES[name]
    if kind == "average_bits" or which == "ratio":
        amounts = {s: float(site.macs if kind == "bops" else site.weight_count) for s, site in sites.items()}
        old, new = sum(amounts.values()), sum(amounts[s] * factors[s] for s in amounts)
        if kind == "size":
            rest = program[CostTables]["size"].float_cost / FLOAT_BYTES - old
            old, new = old + rest, new + rest
        return old / new
    return 1.0
