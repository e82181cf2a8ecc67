"""Choose a precision for every site: the integer quadratic program, one plan per surrogate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from fxquant.core.allocation import BitAllocation, Finalists
from fxquant.core.budget import Budget
from fxquant.core.cost import CostTable, CostTables
from fxquant.core.errors import InfeasibleBudgetError, SolverError
from fxquant.core.program import Program
from fxquant.core.sensitivity import SensitivityMatrix, Surrogates
from fxquant.core.spec import Choice, Site, Sites
from fxquant.passes.allocation import SOLVERS
from fxquant.passes.base import Pass

LIMIT_TABLES: Mapping[str, tuple[str, str]] = {
    "size_mb": ("size", "absolute"),
    "size_ratio": ("size", "ratio"),
    "average_bits": ("average_bits", "absolute"),
    "bops": ("bops", "absolute"),
    "bops_ratio": ("bops", "ratio"),
    "latency_ms": ("latency", "absolute"),
    "latency_ratio": ("latency", "ratio"),
}
"""Budget limit -> (cost table, whether it is against the float model)."""

SCALES = {"size_mb": 1e6}
"""Units of a limit in the unit of its table, where they differ."""


def unit_of(limit: str, tables: CostTables) -> float:
    """Return how much of its table's unit one unit of a limit is."""
    name, kind = LIMIT_TABLES[limit]
    return tables[name].float_cost if kind == "ratio" else SCALES.get(limit, 1.0)


def usage(choices: Mapping[str, Choice], limits: Mapping[str, float], tables: CostTables) -> dict[str, float]:
    """Return what a plan uses of each limit, in the limit's own unit."""
    return {name: tables[LIMIT_TABLES[name][0]].of(choices) / unit_of(name, tables) for name in limits}


def fits(choices: Mapping[str, Choice], limits: Mapping[str, float], tables: CostTables) -> bool:
    """Whether a plan keeps every limit."""
    used = usage(choices, limits, tables)
    return all(used[name] <= limit * (1 + 1e-9) for name, limit in limits.items())


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Write `Finalists`, the best plan of every surrogate and the uniform plans that fit, and `BitAllocation`.

    Args:
        budget: the limits.
        solver: name of the solver.
        time_limit: seconds for each solve.
        seed: seed of the solver's search.

    Raises:
        InfeasibleBudgetError: no plan keeps the limits; names the reachable range of each.
    """

    budget: Budget
    solver: str = "iqp"
    time_limit: float = 60.0
    seed: int = 0
    reads = (Sites, Surrogates, CostTables)
    writes = (BitAllocation, Finalists)

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its plans; the preferred surrogate's is the `BitAllocation`."""
        limits, tables, sites = self.budget.limits, program[CostTables], program[Sites]
        matrices = program[Surrogates].matrices
        plans = {name: self._solve(matrix, sites, tables) for name, matrix in matrices.items()}
        preferred = next(iter(matrices.values()))
        for name, choices in uniform_plans(sites.sites).items():
            if fits(choices, limits, tables):
                plans[name] = BitAllocation(
                    choices,
                    estimator=name,
                    objective=preferred.predict(choices),
                    status="uniform",
                    used=usage(choices, limits, tables),
                    limits=limits,
                )
        return program.with_facts(plans[next(iter(matrices))], Finalists(plans)), 0

    def _solve(self, matrix: SensitivityMatrix, sites: Sites, tables: CostTables) -> BitAllocation:
        limits = self.budget.limits
        costs, bounds = _rows(limits, tables, sites)
        solution = SOLVERS[self.solver](
            matrix.values, matrix.groups, costs, bounds, time_limit=self.time_limit, seed=self.seed
        )
        if solution.status == "infeasible":
            raise InfeasibleBudgetError(infeasible_message(self.budget, sites, tables))
        picked = [c for c, chosen in zip(matrix.candidates, solution.choice, strict=True) if chosen]
        choices = {candidate.site: candidate.choice for candidate in picked}
        if len(choices) != len(sites.sites):
            raise SolverError(f"solver {self.solver!r} chose {len(picked)} precisions for {len(sites.sites)} sites")
        return BitAllocation(
            choices,
            estimator=matrix.estimator,
            objective=solution.objective,
            bound=solution.bound,
            gap=solution.gap,
            status=solution.status,
            used=usage(choices, limits, tables),
            limits=limits,
        )


def _rows(
    limits: Mapping[str, float], tables: CostTables, sites: Sites
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the limits and the activation ties as `costs @ x <= bounds`, limits scaled to a right side of 1."""
    rows, bounds = _tie_rows(sites)
    for name, limit in limits.items():
        table = tables[LIMIT_TABLES[name][0]]
        room = limit * unit_of(name, tables) - table.constant
        # A common scale keeps the solver's tolerances meaningful for bytes and bit operations alike.
        scale = max(abs(room), 1e-9)
        rows.append(table.values / scale)
        bounds.append(room / scale)
    return np.array(rows, dtype=np.float64).reshape(-1, len(sites.candidates)), np.array(bounds, dtype=np.float64)


def _tie_rows(sites: Sites) -> tuple[list[NDArray[np.float64]], list[float]]:
    """Return the activation ties as rows and right sides: sites that read one value agree on its integer width.

    A site in float does not read the quantized value and so agrees with everybody. Where it cannot happen, two
    opposite rows say that both sites choose a width or neither does, which is tighter than "not two widths at once".
    """
    rows: list[NDArray[np.float64]] = []
    bounds: list[float] = []
    for one, other in _tied_pairs(sites.sites):
        widths = sorted({c.activation_bits for site in (one, other) for c in site.choices if not c.is_float})
        # With one width on both sides there is nothing to disagree about.
        if len(widths) < 2:
            continue
        loose = any(c.is_float for site in (one, other) for c in site.choices)
        for bits in widths:
            mine = _mask(sites, one, {bits})
            if loose:
                rows.append(mine + _mask(sites, other, set(widths) - {bits}))
                bounds.append(1.0)
            else:
                row = mine - _mask(sites, other, {bits})
                rows += [row, -row]
                bounds += [0.0, 0.0]
    return rows, bounds


def _tied_pairs(sites: tuple[Site, ...]) -> list[tuple[Site, Site]]:
    """Return the pairs of sites that read one value; neighbours only where agreement passes from one to the next."""
    ties: defaultdict[str, list[Site]] = defaultdict(list)
    for site in sites:
        ties[site.input_tie].append(site)
    found: list[tuple[Site, Site]] = []
    for members in ties.values():
        # A site in float between two others passes nothing on, so every pair counts then.
        broken = any(choice.is_float for site in members for choice in site.choices)
        found += combinations(members, 2) if broken else pairwise(members)
    return found


def _mask(sites: Sites, site: Site, widths: set[int]) -> NDArray[np.float64]:
    """Return 1 for the candidates of a site that read its activation at one of these widths."""
    picked = [c.site == site.name and c.choice.activation_bits in widths for c in sites.candidates]
    return np.array(picked, dtype=np.float64)


def uniform_plans(sites: tuple[Site, ...]) -> dict[str, dict[str, Choice]]:
    """Return name -> plan that gives every site one precision, sites without that choice their nearest wider one.

    Left out are plans in which a pinned site and another one want two widths of the value that both read.
    """
    plans: dict[str, dict[str, Choice]] = {}
    for choice in sorted({choice for site in sites for choice in site.choices}):
        plan = {site.name: _nearest(site, choice) for site in sites}
        if _agrees(sites, plan):
            plans[f"uniform {choice.label}"] = plan
    return plans


def _agrees(sites: tuple[Site, ...], plan: Mapping[str, Choice]) -> bool:
    widths: defaultdict[str, set[int]] = defaultdict(set)
    for site in sites:
        if not plan[site.name].is_float:
            widths[site.input_tie].add(plan[site.name].activation_bits)
    return all(len(found) == 1 for found in widths.values())


def _nearest(site: Site, choice: Choice) -> Choice:
    return next((c for c in site.choices if c >= choice), site.choices[-1])


def infeasible_message(budget: Budget, sites: Sites, tables: CostTables) -> str:
    """Return what can be reached for each limit of a budget that cannot be met."""
    lines = []
    for name, limit in budget.limits.items():
        low, high = reachable(tables[LIMIT_TABLES[name][0]], sites)
        unit = unit_of(name, tables)
        lines.append(f"{name}={limit:g} (reachable: {low / unit:.4g} to {high / unit:.4g})")
    return "no plan keeps the budget " + ", ".join(lines) + "; raise the limit or allow narrower bits"


def reachable(table: CostTable, sites: Sites) -> tuple[float, float]:
    """Return the least and the most any plan can cost."""
    low = high = table.constant
    for site in sites.sites:
        values = [v for c, v in zip(table.candidates, table.values, strict=True) if c.site == site.name]
        low, high = low + min(values), high + max(values)
    return low, high
