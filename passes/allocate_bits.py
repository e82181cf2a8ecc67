"""Choose a precision for every site: solve an integer quadratic program for each surrogate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fxquant.core.errors import InfeasibleBudgetError, OptionError, SolverError
from fxquant.core.facts import (
    BitAllocation,
    Budget,
    CostTables,
    Finalists,
    SensitivityMatrix,
    Surrogates,
    agrees,
    fits,
    infeasible_message,
    limit_products,
    limit_rows,
    tie_rows,
)
from fxquant.core.ir import Choice, Program, QuantizedEdges, Site, Sites
from fxquant.passes.allocation import SOLVERS, borders_of, fill, modelled_plan, one_hot
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Write `Finalists` and `BitAllocation`.

    Finalists are the best plan of every surrogate, the same with the slack of the limits spent on wider sites, and the
    uniform plans that fit.

    Args:
        budget: the limits.
        solver: name of the solver.
        time_limit: seconds for each solve.
        seed: seed of the solver's search.
        requantization_cost: added for two neighbours with unlike activation widths, in the unit of the loss, >= 0.
        near: (plan, radius): at most `radius` sites may differ from that plan; None for no such limit.

    Raises:
        InfeasibleBudgetError: no plan keeps the limits; names the reachable range of each.
        OptionError: a requantization cost that is not a finite number of at least 0.
    """

    budget: Budget
    solver: str = "iqp"
    time_limit: float = 60.0
    seed: int = 0
    requantization_cost: float = 0.0
    near: tuple[BitAllocation, int] | None = None
    reads = (QuantizedEdges, Sites, Surrogates, CostTables)
    writes = (BitAllocation, Finalists)

    def __post_init__(self) -> None:
        if not 0.0 <= self.requantization_cost < math.inf:
            raise OptionError(f"requantization_cost={self.requantization_cost} must be a finite number of at least 0")

    def run(self, program: Program) -> tuple[Program, int]:
        """Return the program with its plans; the preferred surrogate's is the `BitAllocation`."""
        limits, sites = self.budget.limits, program[Sites].sites
        matrices, borders = program[Surrogates].matrices, borders_of(program, self.requantization_cost)
        if all(len(site.choices) == 1 for site in sites):
            only = self._only(program, matrices, borders)
            return program.with_facts(only, Finalists({only.estimator: only})), 0
        plans = {name: self._solve(program, matrix, borders) for name, matrix in matrices.items()}
        for name, matrix in matrices.items():
            filled = self._filled(program, plans[name], matrix, borders)
            if filled.choices != plans[name].choices:
                plans[f"{name}, filled"] = filled
        preferred = next(iter(matrices))
        for name, choices in uniform_plans(sites).items():
            if fits(choices, limits, program[CostTables]):
                plan = modelled_plan(program, choices, matrices[preferred], borders, limits)
                plans[name] = replace(plan, estimator=name, status="uniform")
        return program.with_facts(plans[preferred], Finalists(plans)), 0

    def _only(
        self, program: Program, matrices: Mapping[str, SensitivityMatrix], borders: NDArray[np.float64]
    ) -> BitAllocation:
        """Return the only plan there is."""
        limits, choices = self.budget.limits, {site.name: site.choices[0] for site in program[Sites].sites}
        if not fits(choices, limits, program[CostTables]):
            raise InfeasibleBudgetError(infeasible_message(self.budget, program[Sites], program[CostTables]))
        name, matrix = next(iter(matrices.items()))
        plan = modelled_plan(program, choices, matrix, borders, limits)
        bound = plan.objective + plan.border_cost
        return replace(plan, estimator=name, status="optimal", bound=bound, gap=0.0)

    def _solve(self, program: Program, matrix: SensitivityMatrix, borders: NDArray[np.float64]) -> BitAllocation:
        limits, tables, sites = self.budget.limits, program[CostTables], program[Sites]
        (costs, bounds), (ties, sides) = limit_rows(limits, tables, sites), tie_rows(sites)
        around, room = self._near_row(sites)
        before = len(ties) + len(around)
        products = {before + row: each for row, each in limit_products(limits, tables, sites).items()}
        solution = SOLVERS[self.solver](
            matrix.values + borders,
            matrix.groups,
            np.concatenate([ties, around, costs]),
            np.concatenate([sides, room, bounds]),
            time_limit=self.time_limit,
            seed=self.seed,
            products=products,
        )
        if solution.interrupted:
            # The solver returns the best plan so far, but Ctrl-C is meant for the run, not for this solve.
            raise KeyboardInterrupt
        if solution.status == "infeasible":
            raise InfeasibleBudgetError(infeasible_message(self.budget, sites, tables))
        choices = _picked(matrix, solution.choice)
        if len(choices) != len(sites.sites):
            count = int(solution.choice.sum())
            raise SolverError(f"solver {self.solver!r} chose {count} precisions for {len(sites.sites)} sites")
        plan = modelled_plan(program, choices, matrix, borders, limits)
        total = plan.objective + plan.border_cost
        return replace(
            plan,
            estimator=matrix.estimator,
            # The matrix has a constant that every plan shares; the solver's bound is without it.
            bound=min(solution.bound + (total - solution.objective), total),
            gap=solution.gap,
            status=solution.status,
            notes=solution.notes,
        )

    def _near_row(self, sites: Sites) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return `-(sites that stay) <= radius - sites` as a row and its right side; none without a plan to be near."""
        if self.near is None:
            return np.zeros((0, len(sites.candidates))), np.zeros(0)
        plan, radius = self.near
        staying = one_hot(sites.candidates, plan.choices).astype(np.float64)
        return -staying[None, :], np.array([float(radius - len(sites.sites))])

    def _filled(
        self, program: Program, plan: BitAllocation, matrix: SensitivityMatrix, borders: NDArray[np.float64]
    ) -> BitAllocation:
        """Return the plan with the slack of its limits spent on wider sites; the measured loss decides later."""
        sites, tables = program[Sites], program[CostTables]
        widths = [[c.choice.weight_bits, c.choice.activation_bits] for c in matrix.candidates]
        wider = fill(
            np.diag(matrix.values),
            matrix.groups,
            *limit_rows(plan.limits, tables, sites),
            *tie_rows(sites),
            np.array(widths, dtype=np.float64),
            one_hot(matrix.candidates, plan.choices),
            limit_products(plan.limits, tables, sites),
        )
        filled = modelled_plan(program, _picked(matrix, wider), matrix, borders, plan.limits)
        return replace(filled, estimator=f"{matrix.estimator}, filled", status="measured")


def _picked(matrix: SensitivityMatrix, chosen: NDArray[np.bool_]) -> dict[str, Choice]:
    return {c.site: c.choice for c, taken in zip(matrix.candidates, chosen, strict=True) if taken}


def uniform_plans(sites: tuple[Site, ...]) -> dict[str, dict[str, Choice]]:
    """Return name -> plan that gives every site one precision, sites without that choice their nearest wider one.

    Left out are plans in which a pinned site and another one want two widths of the value that both read.
    """
    plans: dict[str, dict[str, Choice]] = {}
    # Weights that are only stored follow the layers: their nearest wider choice is that of the same width.
    named = [site for site in sites if not site.stored] or sites
    for choice in sorted({choice for site in named for choice in site.choices}):
        plan = {site.name: _nearest(site, choice) for site in sites}
        if agrees(sites, plan):
            plans[f"uniform {choice.label}"] = plan
    return plans


def _nearest(site: Site, choice: Choice) -> Choice:
    return next((c for c in site.choices if c >= choice), site.choices[-1])
