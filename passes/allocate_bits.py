"""Choose a precision for every site: the integer quadratic program, one plan per surrogate."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    usage,
)
from fxquant.core.ir import Choice, Program, QuantizedEdges, Site, Sites
from fxquant.passes.allocation import SOLVERS, border_cost, borders_of, fill, one_hot
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Write `Finalists` and `BitAllocation`.

    Finalists are the best plan of every surrogate, the same with what the limits leave over spent on wider sites, and
    the uniform plans that fit.

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
        limits, tables, sites = self.budget.limits, program[CostTables], program[Sites]
        matrices = program[Surrogates].matrices
        borders = borders_of(program, self.requantization_cost)
        plans = {name: self._solve(matrix, borders, sites, tables) for name, matrix in matrices.items()}
        for name, matrix in matrices.items():
            filled = self._fill(plans[name], matrix, borders, sites, tables)
            if filled.choices != plans[name].choices:
                plans[f"{name}, filled"] = filled
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
                    border_cost=border_cost(borders, one_hot(sites.candidates, choices)),
                )
        return program.with_facts(plans[next(iter(matrices))], Finalists(plans)), 0

    def _solve(
        self, matrix: SensitivityMatrix, borders: NDArray[np.float64], sites: Sites, tables: CostTables
    ) -> BitAllocation:
        limits = self.budget.limits
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
            # The solver hands over what it has; but who pressed Ctrl-C wants the run to end, not this solve.
            raise KeyboardInterrupt
        if solution.status == "infeasible":
            raise InfeasibleBudgetError(infeasible_message(self.budget, sites, tables))
        picked = [c for c, chosen in zip(matrix.candidates, solution.choice, strict=True) if chosen]
        choices = {candidate.site: candidate.choice for candidate in picked}
        if len(choices) != len(sites.sites):
            raise SolverError(f"solver {self.solver!r} chose {len(picked)} precisions for {len(sites.sites)} sites")
        objective, requantized = matrix.predict(choices), border_cost(borders, one_hot(sites.candidates, choices))
        return BitAllocation(
            choices,
            estimator=matrix.estimator,
            objective=objective,
            # The solver knows nothing of what every plan has in common.
            bound=min(solution.bound + (objective + requantized - solution.objective), objective + requantized),
            gap=solution.gap,
            status=solution.status,
            used=usage(choices, limits, tables),
            limits=limits,
            border_cost=requantized,
            notes=solution.notes,
        )

    def _near_row(self, sites: Sites) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return `-(sites that stay) <= radius - sites` as a row and its right side; none without a plan to be near."""
        if self.near is None:
            return np.zeros((0, len(sites.candidates))), np.zeros(0)
        plan, radius = self.near
        staying = one_hot(sites.candidates, plan.choices).astype(np.float64)
        return -staying[None, :], np.array([float(radius - len(sites.sites))])

    def _fill(
        self,
        plan: BitAllocation,
        matrix: SensitivityMatrix,
        borders: NDArray[np.float64],
        sites: Sites,
        tables: CostTables,
    ) -> BitAllocation:
        """Return the plan with what the limits leave over spent, for the measured loss to compare with it."""
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
        choices = {c.site: c.choice for c, chosen in zip(matrix.candidates, wider, strict=True) if chosen}
        return BitAllocation(
            choices,
            estimator=f"{matrix.estimator}, filled",
            objective=matrix.predict(choices),
            status="feasible",
            used=usage(choices, plan.limits, tables),
            limits=plan.limits,
            border_cost=border_cost(borders, one_hot(sites.candidates, choices)),
        )


def uniform_plans(sites: tuple[Site, ...]) -> dict[str, dict[str, Choice]]:
    """Return name -> plan that gives every site one precision, sites without that choice their nearest wider one.

    Left out are plans in which a pinned site and another one want two widths of the value that both read.
    """
    plans: dict[str, dict[str, Choice]] = {}
    for choice in sorted({choice for site in sites for choice in site.choices}):
        plan = {site.name: _nearest(site, choice) for site in sites}
        if agrees(sites, plan):
            plans[f"uniform {choice.label}"] = plan
    return plans


def _nearest(site: Site, choice: Choice) -> Choice:
    return next((c for c in site.choices if c >= choice), site.choices[-1])
